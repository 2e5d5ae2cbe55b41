"""The examination of this machine, or of all nodes of a launched job together."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.config.hardware import Hardware, find_hardware, known_hardware, load_hardware
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.nvml import GPUState, Nvml
from moepp_megatron.runtime.optional import flex_backend
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.tools.doctor import card_checks, folders, gpu_checks, packages, speed, system
from moepp_megatron.tools.doctor.finding import Finding, Judge
from moepp_megatron.tools.doctor.gpu_checks import Cards

# What only a GPU at work shows.
_UNDER_LOAD = ("GPU throttling", "PCIe")


@dataclass(frozen=True)
class Request:
    """A request to examine this machine, and with a `config` whether the run can start on it.

    `hardware` is the name or file of a hardware description; None takes the GPU's. With `preflight`
    a job is about to start, so that findings that would spoil it are errors. The job expects
    `expected_gpus` GPUs; None checks no number.
    """

    config: Config | None = None
    hardware: str | None = None
    preflight: bool = False
    expected_gpus: int | None = None


def expected_gpus(environment: Mapping[str, str] = os.environ) -> int | None:
    """GPUs of this node that Slurm has given to the job; None outside of a job with GPUs."""
    value = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(value) if value.isdigit() else None


class _NodeExaminer:
    """Examines this node; `own_pids` of this examination may hold memory on the GPUs."""

    def __init__(
        self, request: Request, cards: Cards, own_pids: frozenset[int] = frozenset()
    ) -> None:
        self.request, self.cards = request, cards
        self.hardware = _hardware(request, cards)
        known = self.hardware or Hardware(name="not described")
        self.judge = Judge(known, request.preflight, own_pids | {os.getpid()})

    def node_findings(self) -> list[Finding]:
        """All findings except those of speeds."""
        request, cards = self.request, self.cards.cards
        described = request.hardware is None
        return [
            *gpu_checks.check_together(self.cards, self.hardware, described, request.expected_gpus),
            *(card_checks.check_cards(cards, self.judge) if cards else []),
            *system.check_system(self.judge.hardware, len(cards)),
            *folders.check_folders(request.config, self.judge.thresholds),
            *packages.check_packages(request.config),
        ]

    def speed_findings(
        self, speeds: list[speed.DeviceSpeed], loaded: list[GPUState] | None = None
    ) -> list[Finding]:
        """Findings from this node's matrix products, and from its GPUs while they ran."""
        findings = speed.check_matmul(speeds, self.judge)
        for name in _UNDER_LOAD:
            findings += card_checks.signs(loaded or [], self.judge, name)
        return findings


def _hardware(request: Request, cards: Cards) -> Hardware | None:
    """The description to judge by: the one named, the GPU's, or a CPU machine's."""
    if request.hardware is not None:
        return load_hardware(request.hardware)
    names = [card.name for card in cards.cards if card.name is not None]
    if names:
        return find_hardware(names[0])
    # GPUs that do not even say their name are no CPU machine; descriptions come with the source
    # tree and not with a wheel.
    if cards.cards or "cpu" not in known_hardware():
        return None
    return load_hardware("cpu")


@dataclass(frozen=True)
class _RankReport:
    """A rank's findings for the others; `loaded` is its GPU's state during the matrix product."""

    node: str
    speed: speed.DeviceSpeed
    findings: list[Finding]
    loaded: list[GPUState]


def examine_machine(request: Request) -> list[Finding]:
    """Examine this machine from one process: every GPU in turn, or the CPU."""
    cards = Cards.read()
    examiner = _NodeExaminer(request, cards)
    findings = examiner.node_findings()
    loaded: list[GPUState] = []
    speeds = [speed.DeviceSpeed(_name(each), _matmul(each, loaded)) for each in _devices()]
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
    node = socket.gethostname()
    name = _name(device) if device.type == "cuda" else f"CPU, rank {rank.rank}"
    device_speed = speed.DeviceSpeed(name, _matmul(device, loaded), node)
    examiner = _NodeExaminer(request, cards, _siblings()) if rank.local_rank == 0 else None
    mine = examiner.node_findings() if examiner is not None else []
    findings = [finding.on(node) for finding in mine]
    report = _RankReport(node, device_speed, findings, loaded)
    collectives = speed.measure_collectives(device)
    if flex_backend("deepep") is not None and rank.world_size > 1:
        from megatron.core.transformer.moe.fused_a2a import fused_combine, fused_dispatch

        findings.append(speed.check_dispatch(fused_dispatch, fused_combine, device).on(node))
    reports = distributed.gathered(report)
    if rank.rank != 0:
        return None
    assert examiner is not None, "rank 0 is the first of its node"
    return _together(examiner, rank, reports, collectives)


def _together(
    examiner: _NodeExaminer,
    rank: RankEnvironment,
    reports: list[_RankReport],
    collectives: list[speed.CollectiveSpeed],
) -> list[Finding]:
    """Findings of all nodes, and of their collectives."""
    findings = [finding for report in reports for finding in report.findings]
    nodes = list(dict.fromkeys(report.node for report in reports))
    for node in nodes:
        node_reports = [report for report in reports if report.node == node]
        loaded = [card for report in node_reports for card in report.loaded]
        speeds = [report.speed for report in node_reports]
        findings += [finding.on(node) for finding in examiner.speed_findings(speeds, loaded)]
    if rank.world_size > 1:
        speeds = [report.speed for report in reports]
        findings.append(speed.check_slowest(speeds, examiner.judge))
    sizes = rank.world_size, rank.local_world_size
    findings += [speed.check_collective(each, *sizes, examiner.judge) for each in collectives]
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
