"""Runs an examination: alone on this machine, or as one of several launched ranks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist

from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.nvml import GPUState, Nvml
from moepp_megatron.runtime.optional import flex_backend
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.tools.doctor import speed
from moepp_megatron.tools.doctor.examine import Cards, NodeExaminer, Request, this_node
from moepp_megatron.tools.doctor.finding import Finding
from moepp_megatron.tools.doctor.speed_checks import (
    DeviceSpeed,
    check_collective,
    check_dispatch,
    check_slowest,
)
from moepp_megatron.tools.doctor.system import check_clock_skew


@dataclass(frozen=True)
class _RankReport:
    """A rank's findings for the others; `loaded` is its GPU's state during the matrix product."""

    node: str
    speed: DeviceSpeed
    clock_offset: float
    findings: list[Finding]
    loaded: list[GPUState]


def examine_machine(request: Request) -> list[Finding]:
    """Examine this machine from one process: every GPU in turn, or the CPU."""
    cards = Cards.read()
    examiner = NodeExaminer(request, cards)
    findings = examiner.node_findings()
    loaded: list[GPUState] = []
    speeds = []
    for device in _devices():
        speeds.append(DeviceSpeed(_name(device), _matmul(device, loaded)))
    return _once(findings + examiner.speed_findings(speeds, loaded))


def examine_ranks(request: Request, rank: RankEnvironment) -> list[Finding] | None:
    """Findings of all nodes of a launched job on rank 0, None elsewhere; every rank must call."""
    # Before this rank's own process holds memory on the GPUs.
    cards = Cards.read() if rank.local_rank == 0 else Cards([])
    device = distributed.start(rank, timeout=timedelta(minutes=3))
    try:
        return _examine_started(request, rank, cards, device)
    finally:
        dist.destroy_process_group()


def _examine_started(
    request: Request, rank: RankEnvironment, cards: Cards, device: torch.device
) -> list[Finding] | None:
    loaded: list[GPUState] = []
    node = this_node()
    name = _name(device) if device.type == "cuda" else f"CPU, rank {rank.rank}"
    device_speed = DeviceSpeed(name, _matmul(device, loaded), node)
    examiner = NodeExaminer(request, cards, _siblings()) if rank.local_rank == 0 else None
    mine = examiner.node_findings() if examiner is not None else []
    findings = [finding.on(node) for finding in mine]
    report = _RankReport(node, device_speed, speed.clock_offset(), findings, loaded)
    collectives = speed.measure_collectives(device)
    if flex_backend("deepep") is not None and rank.world_size > 1:
        from megatron.core.transformer.moe.fused_a2a import fused_combine, fused_dispatch

        problem = speed.dispatch_problem(fused_dispatch, fused_combine, device)
        findings.append(check_dispatch(problem).on(node))
    reports: list[Any] = [None] * rank.world_size
    dist.all_gather_object(reports, report)
    if rank.rank != 0:
        return None
    assert examiner is not None, "rank 0 is the first of its node"
    return _together(examiner, rank, reports, collectives)


def _together(
    examiner: NodeExaminer,
    rank: RankEnvironment,
    reports: list[_RankReport],
    collectives: list[speed.CollectiveSpeed],
) -> list[Finding]:
    """Findings of all nodes, and of their collectives."""
    thresholds, hardware = examiner.judge.thresholds, examiner.hardware
    findings = [finding for report in reports for finding in report.findings]
    nodes = list(dict.fromkeys(report.node for report in reports))
    for node in nodes:
        node_reports = [report for report in reports if report.node == node]
        loaded = [card for report in node_reports for card in report.loaded]
        speeds = [report.speed for report in node_reports]
        findings += [finding.on(node) for finding in examiner.speed_findings(speeds, loaded)]
    if rank.world_size > 1:
        findings.append(check_slowest([report.speed for report in reports], thresholds))
    link = hardware.nvlink_gb_s if hardware is not None else None
    network = hardware.network_gbit_s_per_gpu if hardware is not None else None
    for collective in collectives:
        expected = speed.expected_seconds(
            collective,
            rank.world_size,
            rank.local_world_size,
            # Rated in both directions together.
            None if link is None else link / 2 * 1e9,
            None if network is None else network / 8 * 1e9,
        )
        findings.append(
            check_collective(
                collective.name,
                collective.num_bytes,
                collective.seconds,
                expected,
                thresholds,
                examiner.judge.unfit_now,
            )
        )
    if len(nodes) > 1:
        offsets = {
            node: median(r.clock_offset for r in reports if r.node == node) for node in nodes
        }
        findings.append(check_clock_skew(offsets, thresholds))
    return _once(findings)


def _siblings() -> frozenset[int]:
    """The other ranks of this node, which their launcher has started like this one."""
    return frozenset(process.pid for process in psutil.Process(os.getppid()).children())


def _once(findings: list[Finding]) -> list[Finding]:
    """Remove duplicates: a GPU that is throttled both idle and under load has one finding."""
    return list(dict.fromkeys(findings))


def _devices() -> list[torch.device]:
    if torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu")]


def _name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else f"GPU {device.index}"


def _matmul(device: torch.device, loaded: list[GPUState]) -> float:
    """The device's rate; the state of its GPU during the product is added to `loaded`."""
    if device.type == "cpu":
        # A process on every core would measure the other ranks instead.
        return speed.matmul_tflops(device)
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def look() -> None:
        with Nvml() as nvml:
            loaded.extend(nvml.card(index) for index in nvml.index_of([uuid]))

    return speed.matmul_tflops(device, look)
