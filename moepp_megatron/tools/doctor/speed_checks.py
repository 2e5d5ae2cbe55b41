"""Judges measured speeds of devices, ranks and links; measures nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from moepp_megatron.config.hardware import Hardware, Thresholds
from moepp_megatron.tools.doctor.finding import Finding, Severity, error, warning

_MATMUL = "matrix product"


@dataclass(frozen=True)
class DeviceSpeed:
    """Rate of a device's matrix product, TFLOP/s; `name` such as "GPU 3" or "CPU, rank 1"."""

    name: str
    tflops: float
    node: str = ""


def check_matmul(
    speeds: Sequence[DeviceSpeed], hardware: Hardware | None, thresholds: Thresholds, bad: Severity
) -> list[Finding]:
    """Compare one node's devices with the rated bf16 rate; one finding for those that reach it.

    Without a rated rate speeds are reported, not judged. `bad` is the severity of a slow device.
    """
    rated_tflops = hardware.bf16_tflops if hardware is not None else None
    if rated_tflops is None:
        text = ", ".join(f"{s.name}: {s.tflops:.3g} TFLOP/s" for s in speeds)
        return [Finding(_MATMUL, f"{text} (no rated speed to compare with)")]
    least = rated_tflops * thresholds.matmul_fraction
    slow = [
        Finding(
            _MATMUL,
            f"{s.name}: {s.tflops:.0f} TFLOP/s in bf16",
            f"should reach {least:.0f} of {rated_tflops:.0f} TFLOP/s",
            "look at GPU throttling, GPU power cap and GPU processes; else leave the node out",
            bad,
        )
        for s in speeds
        if s.tflops < least
    ]
    if slow:
        return slow
    low, high = min(s.tflops for s in speeds), max(s.tflops for s in speeds)
    share = f"{low / rated_tflops:.0%} of the rated {rated_tflops:.0f}"
    observation = f"{low:.0f} to {high:.0f} TFLOP/s in bf16, {share}"
    return [Finding(_MATMUL, observation)]


def check_slowest(speeds: Sequence[DeviceSpeed], thresholds: Thresholds) -> Finding:
    """Compare the slowest device of all ranks, named with its node, with their median."""
    slowest = min(speeds, key=lambda speed: speed.tflops)
    ratio = median(speed.tflops for speed in speeds) / slowest.tflops
    where = f"{slowest.name} of {slowest.node}" if slowest.node else slowest.name
    observation = f"{where}: {ratio:.2f} times the median time"
    if ratio <= thresholds.slowest_ratio:
        return Finding("slowest rank", observation)
    return warning(
        "slowest rank",
        observation,
        f"should be at most {thresholds.slowest_ratio:g}",
        f"all ranks wait for it: look at its findings, or exclude {slowest.node or 'the device'}",
    )


def check_dispatch(problem: str | None) -> Finding:
    """Report whether DeepEP has sent tokens to all ranks and back."""
    if problem is None:
        return Finding("dispatch", "DeepEP sends tokens to every rank and back")
    return error(
        "dispatch",
        problem,
        "DeepEP must send tokens to every rank and back",
        "moe.dispatcher=alltoall does without DeepEP; docs/troubleshooting.md has causes",
    )


def check_collective(
    name: str,
    num_bytes: int,
    seconds: float,
    expected: float | None,
    thresholds: Thresholds,
    bad: Severity,
) -> Finding:
    """Compare a collective, of a buffer of `num_bytes` a rank, with the time that rated links need.

    Without `expected` seconds the time is reported, not judged. `bad` is the severity of a slow
    one.
    """
    observation = f"{num_bytes / 2**20:.0f} MiB a rank in {seconds * 1e3:.3g} ms"
    if expected is None:
        return Finding(name, f"{observation} (no rated speed to compare with)")
    share = expected / seconds
    observation += f", {share:.0%} of the rated links"
    if share >= thresholds.collective_fraction:
        return Finding(name, observation)
    return Finding(
        name,
        observation,
        f"should reach {thresholds.collective_fraction:.0%}",
        "look at NVLink and network ports of every node, then at NCCL_DEBUG=INFO for the "
        "transport that NCCL chose",
        bad,
    )
