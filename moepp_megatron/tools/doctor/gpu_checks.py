"""Checks of a node's GPUs together: their number, their model, and driver against torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moepp_megatron.config.hardware import Hardware
from moepp_megatron.runtime.nvml import Driver, GPUState, Nvml, NvmlUnavailableError
from moepp_megatron.tools.doctor.finding import Finding, Severity, error, judged, note, warning


@dataclass(frozen=True)
class Cards:
    """The node's GPUs as NVML reports them, or why it does not."""

    cards: list[GPUState]
    driver: Driver | None = None
    error: NvmlUnavailableError | None = None

    @classmethod
    def read(cls, library: Any = None) -> Cards:
        """Query NVML once; `library` replaces pynvml."""
        try:
            nvml = Nvml(library)
        except NvmlUnavailableError as error:
            return cls([], error=error)
        with nvml:
            return cls([nvml.card(index) for index in range(nvml.count())], nvml.driver())


def check_together(
    found: Cards, hardware: Hardware | None, described: bool, expected: int | None
) -> list[Finding]:
    """Check number, model and driver.

    `described` is false where the user has given the description, `expected` the GPUs of the job.
    """
    if found.error is not None and found.error.has_driver:
        return [
            error(
                "GPU driver",
                f"NVML does not start: {found.error}",
                "the driver must be loaded and match its library",
                "reboot the node (a driver update without reboot does this), or reinstall the "
                "driver",
            )
        ]
    if not found.cards:
        if expected:
            return [_check_count([], expected)]
        reason = found.error or "the driver finds none"
        return [note("GPU count", f"no GPU: {reason}; GPU checks skipped")]
    assert found.driver is not None, "NVML answered"
    return [
        _check_count(found.cards, expected),
        _check_model(found.cards, hardware, described),
        _check_driver(found.driver, _torch_cuda()),
    ]


@dataclass(frozen=True)
class _TorchCuda:
    """The CUDA version torch was built with, as (13, 0), and whether torch can use a GPU."""

    built_with: tuple[int, ...] | None
    available: bool


def _torch_cuda() -> _TorchCuda:
    built = torch.version.cuda
    parts = None if built is None else tuple(int(part) for part in built.split(".")[:2])
    return _TorchCuda(parts, torch.cuda.is_available())


def _check_count(cards: Sequence[GPUState], expected: int | None) -> Finding:
    """Check that there are as many GPUs as the job expects."""
    count = f"{len(cards)} GPUs" if len(cards) != 1 else "1 GPU"
    return judged(
        expected is None or len(cards) >= expected,
        "GPU count",
        count,
        f"must be {expected}",
        "look for a GPU that has left the bus (dmesg, lspci), reboot the node, or ask for fewer",
        Severity.ERROR,
    )


def _check_model(cards: Sequence[GPUState], hardware: Hardware | None, described: bool) -> Finding:
    """Check that all GPUs are of one kind, and that this kind is described."""
    names = sorted({card.name for card in cards if card.name})
    models = ", ".join(names) or "unknown"
    if len(names) > 1:
        return warning(
            "GPU model",
            models,
            "should all be the same",
            "the slowest GPU sets the pace of all; use nodes with one kind of GPU",
        )
    if hardware is None:
        return note(
            "GPU model",
            f"{models}, not described in configs/hardware: rated numbers are not checked",
            remedy="describe it in a YAML file and give --hardware FILE",
        )
    if not described and names and names[0] not in hardware.device_names:
        return warning(
            "GPU model",
            models,
            f"should be a {hardware.name}",
            "leave out --hardware, or start the job on the nodes it is meant for",
        )
    return Finding("GPU model", f"{models} ({hardware.name})")


def _check_driver(driver: Driver, torch_cuda: _TorchCuda) -> Finding:
    """Check that the driver supports the CUDA version that torch was built with."""
    served = "unknown" if driver.cuda is None else f"{driver.cuda[0]}.{driver.cuda[1]}"
    versions = f"driver {driver.version or 'unknown'} for CUDA {served}"
    if torch_cuda.built_with is None:
        return error(
            "GPU driver",
            f"{versions}, torch without CUDA",
            "torch must be built for CUDA on a machine with GPUs",
            "install torch from the CUDA index that fits the driver",
        )
    versions += f", torch for CUDA {'.'.join(map(str, torch_cuda.built_with))}"
    # A driver supports every CUDA of its own major version and of older ones (NVIDIA's CUDA
    # compatibility guide: minor version compatibility).
    if driver.cuda is not None and driver.cuda[0] < torch_cuda.built_with[0]:
        return error(
            "GPU driver",
            versions,
            f"the driver must serve CUDA {torch_cuda.built_with[0]}",
            "update the driver, or install torch for an older CUDA",
        )
    if not torch_cuda.available:
        return error(
            "GPU driver",
            f"{versions}, torch finds no GPU",
            "torch.cuda.is_available() must be true",
            "check CUDA_VISIBLE_DEVICES, the container's GPU access and the fabric manager",
        )
    return Finding("GPU driver", versions)
