"""Short measurements, and their judgement: a matrix product per device, collectives of ranks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.tools.doctor.finding import Finding, Judge, Severity, error, judged

# Large enough to fill any GPU (1.1 TFLOP each), and enough of them to look at the GPU meanwhile;
# on a CPU small, for laptops.
_GPU_SIZE, _GPU_PRODUCTS = 8192, 200
_CPU_SIZE, _CPU_PRODUCTS = 512, 8
# Of each rank: large enough that bandwidth and not latency decides.
_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 2**20
_REPEATS = 5


_MATMUL = "matrix product"


@dataclass(frozen=True)
class DeviceSpeed:
    """Rate of a device's matrix product, TFLOP/s; `name` such as "GPU 3" or "CPU, rank 1"."""

    name: str
    tflops: float
    node: str = ""


@dataclass(frozen=True)
class CollectiveSpeed:
    """A measured "all-reduce" or "all-to-all": bytes of each rank, median time of the slowest."""

    name: str
    num_bytes: int
    seconds: float


def matmul_tflops(device: torch.device, while_running: Callable[[], None] | None = None) -> float:
    """Rate of a matrix product on `device`, TFLOP/s: bf16 on a GPU, fp32 on a CPU.

    `while_running` is called while the products run on a GPU, to look at the GPU under load.
    """
    on_gpu = device.type == "cuda"
    size, count = (_GPU_SIZE, _GPU_PRODUCTS) if on_gpu else (_CPU_SIZE, _CPU_PRODUCTS)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # Ordinary numbers: the power that a product draws, and so its speed, depends on its bits.
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    _products(left, right, count)  # clocks rise, libraries choose their kernels
    _synchronize(device)
    started = time.perf_counter()
    _products(left, right, count)
    if on_gpu and while_running is not None:
        while_running()
    _synchronize(device)
    seconds = time.perf_counter() - started
    return 2.0 * size**3 * count / seconds / 1e12


def measure_collectives(device: torch.device) -> list[CollectiveSpeed]:
    """All-reduce and all-to-all over the default process group; every rank must call."""
    num_ranks = dist.get_world_size()
    num_bytes = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    # fp32, in equal parts for the all-to-all.
    count = num_bytes // 4 // num_ranks * num_ranks
    sent = torch.ones(count, device=device)
    received = torch.empty_like(sent)
    operations: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(sent),
        "all-to-all": lambda: dist.all_to_all_single(received, sent),
    }
    return [
        CollectiveSpeed(name, count * 4, max(gathered(_median_seconds(operation, device))))
        for name, operation in operations.items()
    ]


def check_dispatch(
    dispatch: Callable[..., Any], combine: Callable[..., Any], device: torch.device
) -> Finding:
    """Send tokens to all ranks and back by DeepEP; every rank must call.

    `dispatch` and `combine` are megatron-core's `fused_dispatch` and `fused_combine`.
    """
    num_ranks, group = dist.get_world_size(), dist.group.WORLD
    tokens = torch.randn(64 * num_ranks, 4096, device=device, dtype=torch.bfloat16)
    experts = torch.arange(len(tokens), device=device).remainder(num_ranks).unsqueeze(1)
    gates = torch.ones(len(tokens), 1, device=device)
    problem = "tokens come back changed"
    try:
        received, *_, handle = dispatch(tokens, experts, gates, num_ranks, group)
        returned, _ = combine(received, group, handle)
        if torch.equal(returned, tokens):
            return Finding("dispatch", "DeepEP sends tokens to every rank and back")
    except RuntimeError as failure:
        problem = str(failure).partition("\n")[0]
    return error(
        "dispatch",
        problem,
        "DeepEP must send tokens to every rank and back",
        "moe.dispatcher=alltoall does without DeepEP; docs/troubleshooting.md has causes",
    )


def _expected_seconds(
    collective: CollectiveSpeed,
    num_ranks: int,
    ranks_per_node: int,
    link_bytes_s: float | None,
    network_bytes_s: float | None,
) -> float | None:
    """Seconds at the rated bandwidths of a GPU one way; None if one that is used is unknown."""
    if num_ranks <= ranks_per_node:
        network_bytes_s = math.inf  # nothing leaves the node
    if link_bytes_s is None or network_bytes_s is None:
        return None
    part = collective.num_bytes / num_ranks
    if collective.name == "all-reduce":
        # A ring sends that much over a rank's slowest link; across nodes all network ports of a
        # node work together.
        return 2 * (num_ranks - 1) * part / min(link_bytes_s, network_bytes_s * ranks_per_node)
    # A part to each rank: over NVLink within the node, over the rank's own port beyond it.
    within = part * (min(num_ranks, ranks_per_node) - 1) / link_bytes_s
    return max(within, part * (num_ranks - ranks_per_node) / network_bytes_s)


def check_matmul(speeds: Sequence[DeviceSpeed], judge: Judge) -> list[Finding]:
    """Return a finding for each device below the rated bf16 rate, or one that reports them all."""
    rated_tflops = judge.hardware.bf16_tflops
    if rated_tflops is None:
        text = ", ".join(f"{s.name}: {s.tflops:.3g} TFLOP/s" for s in speeds)
        return [Finding(_MATMUL, f"{text} (no rated speed to compare with)")]
    least = rated_tflops * judge.thresholds.matmul_fraction
    slow = [
        Finding(
            _MATMUL,
            f"{s.name}: {s.tflops:.0f} TFLOP/s in bf16",
            f"should reach {least:.0f} of {rated_tflops:.0f} TFLOP/s",
            "look at GPU throttling, GPU power cap and GPU processes; else leave the node out",
            judge.unfit_now,
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


def check_slowest(speeds: Sequence[DeviceSpeed], judge: Judge) -> Finding:
    """Compare the slowest device of all ranks, named with its node, with their median."""
    slowest = min(speeds, key=lambda speed: speed.tflops)
    ratio = median(speed.tflops for speed in speeds) / slowest.tflops
    where = f"{slowest.name} of {slowest.node}" if slowest.node else slowest.name
    return judged(
        ratio <= judge.thresholds.slowest_ratio,
        "slowest rank",
        f"{where}: {ratio:.2f} times the median time",
        f"should be at most {judge.thresholds.slowest_ratio:g}",
        f"all ranks wait for it: look at its findings, or exclude {slowest.node or 'the device'}",
        Severity.WARNING,
    )


def check_collective(
    collective: CollectiveSpeed, num_ranks: int, ranks_per_node: int, judge: Judge
) -> Finding:
    """Compare a collective with the time that rated links need; without rates it is reported."""
    name, seconds = collective.name, collective.seconds
    observation = f"{collective.num_bytes / 2**20:.0f} MiB a rank in {seconds * 1e3:.3g} ms"
    link, network = judge.hardware.nvlink_gb_s, judge.hardware.network_gbit_s_per_gpu
    # NVLink is rated in both directions together.
    link, network = link and link / 2 * 1e9, network and network / 8 * 1e9
    expected = _expected_seconds(collective, num_ranks, ranks_per_node, link, network)
    if expected is None:
        return Finding(name, f"{observation} (no rated speed to compare with)")
    share = expected / seconds
    return judged(
        share >= judge.thresholds.collective_fraction,
        name,
        f"{observation}, {share:.0%} of the rated links",
        f"should reach {judge.thresholds.collective_fraction:.0%}",
        "look at NVLink and network ports of every node, then at NCCL_DEBUG=INFO for the "
        "transport that NCCL chose",
        judge.unfit_now,
    )


def _products(left: torch.Tensor, right: torch.Tensor, count: int) -> None:
    out = torch.empty_like(left)
    for _ in range(count):
        torch.mm(left, right, out=out)


def _median_seconds(operation: Callable[[], object], device: torch.device) -> float:
    """Median seconds of an operation, after one that builds connections."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        _synchronize(device)
        started = time.perf_counter()
        operation()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
