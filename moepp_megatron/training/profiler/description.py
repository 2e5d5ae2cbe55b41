"""Data that a trace lacks: groups, layout, node, clock, and the routing of each step."""

from __future__ import annotations

import socket
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout

FORMAT = 1


def describe(config: Config, layout: Layout, clock_ns: list[int]) -> dict[str, Any]:
    """This rank's place in the run, for JSON; all ranks must call.

    Args:
        config: The run's configuration.
        layout: The rank grid.
        clock_ns: This node's clock at the end of each of a few barriers.
    """
    rank = dist.get_rank()
    return {
        "format": FORMAT,
        "name": config.run.name,
        "rank": rank,
        "world_size": dist.get_world_size(),
        "node": socket.gethostname(),
        "backend": dist.get_backend(),
        "device": _device(),
        "dtype": config.precision.dtype,
        "layout": asdict(layout),
        "place": asdict(layout.coordinates(rank)),
        "dispatcher": config.moe.dispatcher,
        "recompute": config.training.recompute_granularity,
        "router_topk": config.moe.router_topk,
        "num_ffn_experts": config.moe.num_ffn_experts,
        "hidden_size": config.model.hidden_size,
        "tokens_per_step": config.training.global_batch_size * config.model.seq_length,
        "nodes": _nodes(),
        "groups": _groups(),
        "clock": {"barrier_unix_ns": clock_ns},
    }


def clock_at_barriers(count: int = 5) -> list[int]:
    """Unix time [ns] on this node when ranks leave a barrier together; all ranks must call."""
    times = []
    for _ in range(count):
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.time_ns())
    return times


def _groups() -> dict[str, dict[str, Any]]:
    """Maps the name of each process group of this rank to its ranks and its description."""
    names = dist.distributed_c10d._world.pg_names
    return {
        name: {
            "ranks": dist.get_process_group_ranks(group),
            "description": group.group_desc,
        }
        for group, name in names.items()
        if isinstance(group, dist.ProcessGroup)
    }


def _nodes() -> list[str]:
    """Host name of each rank."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
