"""`moepp bench collectives`: the network's bandwidth, measured like nccl-tests.

The world is cut into groups of neighbouring ranks, all of which work at once, as expert-parallel
groups do. Sizes, algorithm and bus bandwidth are nccl-tests' (doc/PERFORMANCE.md), so a profile's
bandwidths can be compared with these. Operations are out of place, except all-reduce, which
torch.distributed has in place only. A repetition times a number of calls in a row, on the slowest
rank; the cases take turns within each round of repetitions, so that other load on the machine
affects all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from moepp_megatron.config import UnfitError
from moepp_megatron.workbench.bench.collective_cases import KINDS, Buffers, Case, RankGroup
from moepp_megatron.workbench.profiling.collective import Operation, bus_factor

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CollectiveSetting:
    """Settings of the measurement.

    Attributes:
        operations: Names out of `collective_cases.KINDS`.
        sizes: Wanted sizes in bytes.
        group_sizes: Ranks of a group; each divides the world.
        dtype: "fp32" or "bf16".
        warmup: Calls of each case before the clock runs.
        iterations: Calls of one repetition.
        repeats: Repetitions; the median counts.
    """

    operations: Sequence[str]
    sizes: Sequence[int]
    group_sizes: Sequence[int]
    dtype: str = "fp32"
    warmup: int = 2
    iterations: int = 5
    repeats: int = 5


@dataclass(frozen=True)
class CollectiveResult:
    """One operation at one size in groups of one size.

    Attributes:
        operation: Value of `profiling.collective.Operation`; "send" sends to the next rank while
            receiving from the one before.
        even: False for the all-to-all whose last rank receives most.
        group_size: Ranks of a group.
        nodes: Machines that a group spans at most.
        size_bytes: Size by nccl-tests' convention, for the busiest rank.
        count: The same size in elements.
        dtype: "fp32" or "bf16".
        backend: "gloo" or "nccl".
        time_us: Microseconds per call: median of the repetitions, each of its slowest rank.
        time_min_us: The fastest repetition.
        time_max_us: The slowest.
        algorithm_gb_s: size / time, 1e9 bytes per second.
        bus_gb_s: The same times nccl-tests' factor.
        wrong: Number of wrong elements over all ranks.
    """

    operation: str
    even: bool
    group_size: int
    nodes: int
    size_bytes: int
    count: int
    dtype: str
    backend: str
    time_us: float
    time_min_us: float
    time_max_us: float
    algorithm_gb_s: float
    bus_gb_s: float
    wrong: int


def sizes_between(smallest: int, largest: int, factor: int) -> list[int]:
    """`smallest` times powers of `factor`, up to `largest`, as nccl-tests' -b, -e and -f."""
    sizes = []
    while smallest <= largest:
        sizes.append(smallest)
        smallest *= factor
    return sizes


def default_group_sizes(world_size: int) -> list[int]:
    """Powers of two that divide the world, and the world itself."""
    powers = [2**k for k in range(1, world_size.bit_length()) if world_size % 2**k == 0]
    return sorted({*powers, world_size})


def check_memory(largest: int, local_ranks: int, device: str) -> None:
    """Refuse sizes that this machine cannot hold.

    Args:
        largest: Bytes of the largest message.
        local_ranks: Ranks of this machine.
        device: Type of their devices.

    Raises:
        UnfitError: They are too large.
    """
    # Three buffers, and while they are filled or checked about as many integers of 8 bytes.
    wanted = 3 * largest + 4 * largest
    there = (
        torch.cuda.mem_get_info()[0]
        if device == "cuda"
        else psutil.virtual_memory().available // local_ranks
    )
    if wanted > there:
        raise UnfitError(
            f"--max ({largest} bytes) must leave room for about seven times as much per rank, and "
            f"{there} bytes are free; use a smaller one"
        )


def run_collectives(
    setting: CollectiveSetting,
    device: torch.device,
    ranks_per_node: int,
    progress: Callable[[str], object] = lambda what: None,
) -> list[CollectiveResult]:
    """One result per case, by group size, operation and size; all ranks must call and get the same.

    Args:
        setting: What to measure.
        device: This rank's device.
        ranks_per_node: Ranks of a machine.
        progress: Called with a description before each round: warm-up, repetitions, check.
    """
    groups = [_group(size, ranks_per_node) for size in setting.group_sizes]
    dtype = _DTYPES[setting.dtype]
    # The smallest cases are rounded up to one element for each pair of ranks.
    count = max(max(setting.sizes) // dtype.itemsize, max(setting.group_sizes) ** 2)
    buffers = Buffers(count, dtype, device)
    cases = [
        Case(KINDS[name], group, size, buffers)
        for group in groups
        for name in setting.operations
        for size in setting.sizes
    ]
    progress("warm-up")
    for case in cases:
        case.prepare()
        for _ in range(setting.warmup):
            case.run()
    seconds = _timed_rounds(cases, setting, device, progress)
    progress("check of the data")
    wrong = torch.tensor([case.wrong() for case in cases], dtype=torch.int64, device=device)
    dist.all_reduce(wrong)
    counted = zip(cases, seconds, wrong.tolist(), strict=True)
    return [_result(case, times, errors, setting.dtype) for case, times, errors in counted]


def _group(size: int, ranks_per_node: int) -> RankGroup:
    """This rank's group among consecutive groups of `size`; every rank must call."""
    own, _ = dist.new_subgroups(size)
    first = dist.get_rank() // size * size
    starts = range(0, dist.get_world_size(), size)
    nodes = max((s + size - 1) // ranks_per_node - s // ranks_per_node + 1 for s in starts)
    return RankGroup(own, tuple(range(first, first + size)), nodes)


def _timed_rounds(
    cases: list[Case],
    setting: CollectiveSetting,
    device: torch.device,
    progress: Callable[[str], object],
) -> list[list[float]]:
    """[cases][repeats] seconds per call, of the slowest rank."""
    seconds = torch.zeros(len(cases), setting.repeats, dtype=torch.float64)
    for repeat in range(setting.repeats):
        progress(f"round {repeat + 1} of {setting.repeats}")
        for step in range(len(cases)):
            index = (step + repeat * len(cases) // setting.repeats) % len(cases)
            seconds[index, repeat] = _seconds_a_call(cases[index], setting.iterations)
    on_device = seconds.to(device)
    dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
    slowest: list[list[float]] = on_device.tolist()
    return slowest


def _seconds_a_call(case: Case, iterations: int) -> float:
    case.prepare()
    torch.cuda.synchronize()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(iterations):
        case.run()
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / iterations


def _result(case: Case, seconds: list[float], wrong: int, dtype: str) -> CollectiveResult:
    microseconds = [value * 1e6 for value in seconds]
    middle = statistics.median(microseconds)
    algorithm = case.size / middle / 1e3
    operation: Operation = case.kind.operation
    return CollectiveResult(
        operation=operation.value,
        even=case.kind.even,
        group_size=case.group.size,
        nodes=case.group.nodes,
        size_bytes=case.size,
        count=case.count,
        dtype=dtype,
        backend=dist.get_backend(),
        time_us=middle,
        time_min_us=min(microseconds),
        time_max_us=max(microseconds),
        algorithm_gb_s=algorithm,
        bus_gb_s=algorithm * bus_factor(operation, case.group.size),
        wrong=wrong,
    )
