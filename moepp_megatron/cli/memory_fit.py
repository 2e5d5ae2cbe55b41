"""Estimates with the planner whether a run fits the GPUs of this machine, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moepp_megatron.config import Config, Layout, UnfitError
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError

# `moepp train` imports the planner only where there is a GPU whose memory can be too small.
if TYPE_CHECKING:
    from moepp_megatron.workbench.planning.memory import RankMemory
    from moepp_megatron.workbench.planning.target import Target

GIB = 2**30


def needed_bytes(stages: Sequence[RankMemory]) -> float:
    """Memory of the fullest rank, with what CUDA, NCCL and fragmentation take.

    Args:
        stages: A rank of each pipeline stage.
    """
    from moepp_megatron.workbench.planning.efficiency import DEFAULT

    return max(memory.total for memory in stages) + DEFAULT.reserved_gib * GIB


def fits(needed: float, target: Target) -> bool | None:
    """Whether a device has `needed` bytes; None if its memory is not known, or it is a CPU."""
    from moepp_megatron.workbench.planning.efficiency import DEFAULT

    room = target.memory_bytes
    return None if room is None else needed <= room * (1.0 - DEFAULT.memory_margin)


def refuse_too_large(config: Config, layout: Layout) -> None:
    """Refuse a run whose fullest rank does not fit the GPU of this machine; any run without a GPU.

    Args:
        config: A checked configuration.
        layout: The layout.

    Raises:
        UnfitError: It does not fit; names what it needs, what there is, and remedies.
    """
    if not _has_gpu():
        return
    from moepp_megatron.workbench.planning.memory import rank_memory
    from moepp_megatron.workbench.planning.target import target_of

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


def _has_gpu() -> bool:
    """Whether CUDA shows a GPU to this process; torch, which takes seconds, is not asked."""
    try:
        with Nvml() as nvml:
            return bool(nvml.visible())
    except NvmlUnavailableError:
        return False
