"""Checks of a node's GPUs together: their number, their model, and driver against torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.config.hardware import Hardware
from moepp_megatron.runtime.gpu_state import Driver, GPUState
from moepp_megatron.tools.doctor.finding import Finding, Severity, error, judged, note, warning


@dataclass(frozen=True)
class TorchCuda:
    """The CUDA version torch was built with, as (13, 0), and whether torch can use a GPU."""

    built_with: tuple[int, int] | None
    available: bool


def check_count(cards: Sequence[GPUState], expected: int | None) -> Finding:
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


def check_model(
    cards: Sequence[GPUState], hardware: Hardware | None, described: bool = True
) -> Finding:
    """Check that all GPUs are of one kind, and that this kind is described.

    `described` is false where the user has given the description.
    """
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


def check_driver(driver: Driver, torch_cuda: TorchCuda, num_cards: int) -> Finding:
    """Check that the driver supports the CUDA version that torch was built with.

    A driver supports every CUDA of its own major version and of older ones (NVIDIA's CUDA
    compatibility guide: minor version compatibility).
    """
    served = "unknown" if driver.cuda is None else f"{driver.cuda[0]}.{driver.cuda[1]}"
    versions = f"driver {driver.version or 'unknown'} for CUDA {served}"
    if num_cards == 0:
        return Finding("GPU driver", versions)
    if torch_cuda.built_with is None:
        return error(
            "GPU driver",
            f"{versions}, torch without CUDA",
            "torch must be built for CUDA on a machine with GPUs",
            "install torch from the CUDA index that fits the driver",
        )
    built = f"{torch_cuda.built_with[0]}.{torch_cuda.built_with[1]}"
    versions = f"{versions}, torch for CUDA {built}"
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


def check_driver_fault(message: str) -> Finding:
    """The finding for a driver that is installed but refuses."""
    return error(
        "GPU driver",
        f"NVML does not start: {message}",
        "the driver must be loaded and match its library",
        "reboot the node (a driver update without reboot does this), or reinstall the driver",
    )


def no_cards(reason: str, expected: int | None) -> Finding:
    """The finding for a machine without NVIDIA driver: fine, unless the job expects GPUs."""
    if not expected:
        return note("GPU count", f"no GPU: {reason}; GPU checks skipped")
    return check_count([], expected)
