"""Measures the bandwidth of a cluster's links, for a hardware file and `moepp profile --ceiling`.

    torchrun --nproc-per-node 8 -m moepp_megatron.workbench.bench.links links.json

Groups of 2, 4, ... neighbouring ranks, and of all, exchange at the same time, as expert-parallel
groups do. Sizes and bus bandwidth are those of nccl-tests (doc/PERFORMANCE.md), which checks the
data too. Rank 0 prints what NVLink and the network reach, as `reached:` of a hardware file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.config.choices import parse_size
from moepp_megatron.config.hardware import find_hardware
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.runtime.quiet import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.workbench.profiling.collective import Operation, bus_factor
from moepp_megatron.workbench.profiling.measures.links import link_peaks

_SMALLEST, _FACTOR = 1024, 4
_WARMUP_CALLS, _TIMED_CALLS, _REPEATS = 2, 5, 5


def measure(largest: int, device: torch.device, per_node: int) -> list[dict[str, Any]]:
    """A record for each operation, group size and message size; every rank must call.

    Args:
        largest: Bytes of the largest message; each is 4 times as large as the one before.
        device: This rank's device.
        per_node: Ranks of a machine.

    Returns:
        `operation`, `group_size`, `nodes` (machines of a group), `size_bytes`, `time_us` (median
        of the slowest rank) and `bus_gb_s` (1e9 bytes), the same on all ranks.
    """
    world = dist.get_world_size()
    powers = [2**k for k in range(1, world.bit_length()) if world % 2**k == 0]
    given, taken = (torch.zeros(max(largest // 4, world), device=device) for _ in range(2))
    records = []
    for ranks in sorted({*powers, world}):
        group, _ = dist.new_subgroups(ranks)
        size = min(_SMALLEST, largest)
        while size <= largest:
            count = max(1, size // 4 // ranks) * ranks
            for operation, call in _calls(given[:count], taken[:count], ranks, group).items():
                us = _microseconds(call, device)
                records.append(
                    {
                        "operation": operation.value,
                        "group_size": ranks,
                        "nodes": -(-ranks // per_node),
                        "size_bytes": 4 * count,
                        "time_us": us,
                        "bus_gb_s": 4 * count / us / 1e3 * bus_factor(operation, ranks),
                    }
                )
            size *= _FACTOR
    return records


def _calls(
    given: torch.Tensor, taken: torch.Tensor, ranks: int, group: Any
) -> dict[Operation, Callable[[], object]]:
    part = len(given) // ranks
    members = dist.get_process_group_ranks(group)
    place = members.index(dist.get_rank())

    def to_next() -> None:
        ends = ((dist.isend, given, (place + 1) % ranks), (dist.irecv, taken, place - 1))
        pairs = [dist.P2POp(kind, data, members[peer], group=group) for kind, data, peer in ends]
        for work in dist.batch_isend_irecv(pairs):
            work.wait()

    return {
        Operation.ALL_TO_ALL: lambda: dist.all_to_all_single(taken, given, group=group),
        Operation.ALL_REDUCE: lambda: dist.all_reduce(taken, group=group),
        Operation.ALL_GATHER: lambda: dist.all_gather_into_tensor(taken, given[:part], group=group),
        Operation.REDUCE_SCATTER: lambda: dist.reduce_scatter_tensor(
            taken[:part], given, group=group
        ),
        Operation.SEND: to_next,
    }


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of the repetitions, each of its slowest rank."""
    seconds = []
    for repeat in range(_REPEATS + 1):
        torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        for _ in range(_TIMED_CALLS if repeat else _WARMUP_CALLS):
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / _TIMED_CALLS)
    slowest = torch.tensor(seconds[1:], dtype=torch.float64).to(device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist()) * 1e6


def link_rates(records: Sequence[dict[str, Any]], per_node: int) -> dict[str, float]:
    """GB/s of a GPU in one direction, by all-to-alls: `nvlink` within a node, `network` across."""
    rates: dict[str, float] = {}
    for record in records:
        if record["operation"] == Operation.ALL_TO_ALL:
            link = "nvlink" if record["nodes"] == 1 else "network"
            ranks = record["group_size"]
            others = ranks - (1 if link == "nvlink" else per_node)
            rate = record["size_bytes"] * others / ranks / record["time_us"] / 1e3
            rates[link] = max(rate, rates.get(link, 0.0))
    return rates


def main(arguments: Sequence[str] | None = None) -> None:
    """Be one rank; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("file", type=Path, help="write the measurements here, as JSON")
    parser.add_argument("--max", default="256M", help="bytes of the largest message")
    given = parser.parse_args(arguments)
    largest, rank = parse_size("--max", given.max), RankEnvironment.read()
    if rank.world_size < 2:
        raise ConfigError("links need at least 2 ranks; start this by torchrun --nproc-per-node N")
    quiet()
    with distributed.initialized(rank) as device:
        records = measure(largest, device, rank.local_world_size)
    if rank.rank == 0:
        write_result(given.file, json.dumps(records, indent=1).encode())
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        rated = link_peaks(find_hardware(name))
        for link, rate in link_rates(records, rank.local_world_size).items():
            peak = rated[link]
            share = f", reached: {{{link}: {rate / peak:.3f}}}" if peak else ""
            where = {"nvlink": "within a node", "network": "across nodes"}[link]
            print(f"{where}: {rate:.3g} GB/s of a rank in one direction{share}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, UnfitError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
