"""The device that a configuration is meant for, and whether a run fits it, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moepp_megatron.config import Config, Layout, UnfitError
from moepp_megatron.config.hardware import Hardware, find_hardware, load_hardware
from moepp_megatron.config.sections import used
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError

# `moepp train` imports the planner only where there is a GPU whose memory can be too small.
if TYPE_CHECKING:
    from moepp_megatron.tools.planning.memory import RankMemory

GIB = 2**30
_ASSUMED = "h100_sxm"


@dataclass(frozen=True)
class Target:
    """A kind of device."""

    hardware: Hardware | None  # the GPU; None for this machine's CPU
    reason: str  # why it was chosen, in a few words

    @property
    def memory_bytes(self) -> float | None:
        """Memory of a GPU; None if unknown, and for a CPU."""
        return None if self.hardware is None else self.hardware.memory_bytes


def target_of(config: Config, gpu: str | None = None) -> Target:
    """The device, by the first rule that applies.

    `gpu` (a name in `configs/hardware`, a YAML file, or `cpu`); the GPU that `telemetry.hardware`
    names; the GPU of this machine; an H100 for bf16; this machine's CPU.

    Raises:
        ConfigError: There is no such hardware.
    """
    if gpu is not None:
        return _named(gpu, "--gpu")
    for setting, name in used(config, "gpu"):
        return _named(name, setting)
    here = _card_here()
    if here is not None:
        return Target(here, "the GPU here")
    if config.precision.dtype == "bf16":
        reason = "assumed for precision.dtype bf16; --gpu NAME for another, --gpu cpu for none"
        return Target(load_hardware(_ASSUMED), reason)
    return Target(None, "no GPU here, precision.dtype fp32; --gpu NAME for a GPU")


def _named(name: str, source: str) -> Target:
    hardware = load_hardware(name)
    return Target(hardware if hardware.kind == "gpu" else None, source)


def _card_here() -> Hardware | None:
    """The first GPU of this machine; one that is not in `configs/hardware` has only a name."""
    # torch, which takes seconds to import, is not asked.
    try:
        with Nvml() as nvml:
            visible = nvml.visible()
            if not visible:
                return None
            card = nvml.card(visible[0])
    except NvmlUnavailableError:
        return None
    name = card.name or "unknown GPU"
    return find_hardware(name) or Hardware(name=name)


def needed_bytes(stages: Sequence[RankMemory]) -> float:
    """Memory of the fullest of a rank of each stage, with what CUDA and NCCL take."""
    from moepp_megatron.tools.planning.machine import DEFAULT

    return max(memory.total for memory in stages) + DEFAULT.reserved_gib * GIB


def fits(needed: float, target: Target) -> bool | None:
    """True if `needed` bytes fit a device; None if its memory is not known, or it is a CPU."""
    from moepp_megatron.tools.planning.machine import DEFAULT

    room = target.memory_bytes
    return None if room is None else needed <= room * (1.0 - DEFAULT.memory_margin)


def refuse_too_large(config: Config, layout: Layout) -> None:
    """Refuse a run whose fullest rank does not fit the GPU of this machine; any run without a GPU.

    Raises:
        UnfitError: It does not fit; names what it needs, what there is, and remedies.
    """
    if _card_here() is None:
        return
    from moepp_megatron.tools.planning.memory import rank_memory

    target = target_of(config)
    stages = [rank_memory(config, layout, p) for p in range(layout.pp)]
    needed = needed_bytes(stages)
    if fits(needed, target) is not False:
        return
    assert target.hardware is not None, "a CPU has no memory to compare with"
    assert target.memory_bytes is not None, "an unknown memory is never too small"
    raise UnfitError(
        f"the fullest rank is estimated to need {needed / GIB:,.1f} GiB, and must fit "
        f"{target.hardware.name} ({target.memory_bytes / GIB:,.1f} GiB); moepp train --dry-run "
        "shows what takes it, moepp plan finds layouts that fit; --ignore-memory starts anyway"
    )
