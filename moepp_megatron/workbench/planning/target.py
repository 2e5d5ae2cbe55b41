"""Finds the device that a configuration is meant for, before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config import Config
from moepp_megatron.config.hardware import (
    Hardware,
    find_hardware,
    load_hardware,
    nearest_hardware,
)
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError

_ASSUMED = "h100_sxm"


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        hardware: The GPU; None for this machine's CPU.
        reason: Why it was chosen, in a few words.
    """

    hardware: Hardware | None
    reason: str

    @property
    def memory_bytes(self) -> float | None:
        """Memory of a GPU; None if unknown, and for a CPU."""
        return None if self.hardware is None else self.hardware.memory_bytes


def target_of(config: Config, gpu: str | None = None) -> Target:
    """The device, by the first rule that applies.

    The rules: `gpu`; the GPU that `telemetry.hardware` names; the GPU of this machine; an
    H100 for bf16 and FP8, which are not used on a CPU; this machine's CPU.

    Args:
        config: A checked configuration.
        gpu: A name in `configs/hardware` or a YAML file; `cpu` for this machine's CPU.

    Raises:
        ConfigError: If there is no such hardware.
    """
    if gpu is not None:
        return _named(gpu, "--gpu")
    if config.telemetry.hardware is not None:
        return _named(config.telemetry.hardware, "telemetry.hardware")
    here = _card_here()
    if here is not None:
        return Target(here, "the GPU here")
    if config.precision.dtype == "bf16":
        reason = "assumed for precision.dtype bf16; --gpu NAME for another, --gpu cpu for none"
        return Target(load_hardware(_ASSUMED), reason)
    return Target(None, "no GPU here, precision.dtype fp32; --gpu NAME for a GPU")


def _named(name: str, source: str) -> Target:
    hardware = load_hardware(nearest_hardware(name))
    return Target(hardware if hardware.kind == "gpu" else None, source)


def _card_here() -> Hardware | None:
    """The first GPU of this machine; one that is not in `configs/hardware` has only a name."""
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
