"""The examination of a node, and of all nodes of a launched job together."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.config.hardware import Hardware, find_hardware, known_hardware, load_hardware
from moepp_megatron.runtime.nvml import Driver, GPUState, Nvml, NvmlUnavailableError
from moepp_megatron.runtime.optional import flex_backend
from moepp_megatron.tools.doctor import card_checks, folders, gpu_checks, packages, system
from moepp_megatron.tools.doctor.finding import Finding, Judge
from moepp_megatron.tools.doctor.speed_checks import DeviceSpeed, check_matmul

# What only a GPU at work shows.
_UNDER_LOAD = ("GPU throttling", "GPU clocks", "PCIe")


@dataclass(frozen=True)
class Request:
    """A request for an examination.

    Attributes:
        config: The run that is to start; None examines only the machine.
        hardware: Name or file of a hardware description; None takes the GPU's.
        preflight: Whether a job is about to start; findings that would spoil it are then errors.
        expected_gpus: Number of GPUs that the job expects; None checks no number.
    """

    config: Config | None = None
    hardware: str | None = None
    preflight: bool = False
    expected_gpus: int | None = None


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


def expected_gpus(environment: Mapping[str, str] = os.environ) -> int | None:
    """GPUs of this node that Slurm has given to the job; None outside of a job with GPUs."""
    value = environment.get("SLURM_GPUS_ON_NODE", "")
    return int(value) if value.isdigit() else None


class NodeExaminer:
    """Examines this node; `own_pids` of this examination may hold memory on the GPUs."""

    def __init__(
        self, request: Request, cards: Cards, own_pids: frozenset[int] = frozenset()
    ) -> None:
        self.request, self.cards = request, cards
        self.hardware = _hardware(request, cards)
        self.judge = Judge(
            self.hardware,
            gpu_checks.thresholds_of(self.hardware),
            request.preflight,
            own_pids | {os.getpid()},
        )

    def node_findings(self) -> list[Finding]:
        """All findings except those of speeds."""
        return [*self._gpu(), *self._system(), *self._folders(), *self._packages()]

    def speed_findings(
        self, speeds: list[DeviceSpeed], loaded: list[GPUState] | None = None
    ) -> list[Finding]:
        """Findings from this node's matrix products, and from its GPUs while they ran."""
        findings = check_matmul(speeds, self.hardware, self.judge.thresholds, self.judge.unfit_now)
        for name in _UNDER_LOAD:
            findings += card_checks.signs(loaded or [], self.judge, name)
        return findings

    def _gpu(self) -> list[Finding]:
        cards, expected = self.cards, self.request.expected_gpus
        if cards.error is not None and cards.error.has_driver:
            return [gpu_checks.check_driver_fault(str(cards.error))]
        if not cards.cards:
            reason = str(cards.error) if cards.error is not None else "the driver finds none"
            return [gpu_checks.no_cards(reason, expected)]
        assert cards.driver is not None, "NVML answered"
        described = self.request.hardware is None
        return [
            gpu_checks.check_count(cards.cards, expected),
            gpu_checks.check_model(cards.cards, self.hardware, described),
            gpu_checks.check_driver(cards.driver, packages.torch_cuda(), len(cards.cards)),
            *card_checks.check_cards(cards.cards, self.judge),
        ]

    def _system(self) -> list[Finding]:
        thresholds, num_cards = self.judge.thresholds, len(self.cards.cards)
        ports = system.read_ports()
        rate = self.hardware.network_gbit_s_per_gpu if self.hardware is not None else None
        ibgda = system.check_ibgda(system.driver_parameters(), ports) if flex_backend() else None
        return [
            *([ibgda] if ibgda is not None else []),
            system.check_shared_memory(system.shared_memory_bytes(), thresholds, num_cards > 0),
            *system.check_limits(system.Limits.read(), thresholds, bool(ports)),
            *system.check_ports(ports, num_cards, rate),
            system.check_clock(system.clock_synchronized()),
        ]

    def _folders(self) -> list[Finding]:
        config = self.request.config
        wanted = {"current": (Path.cwd(), 0)} if config is None else folders.config_folders(config)
        return [
            finding
            for name, (path, needed) in wanted.items()
            for finding in folders.check_folder(
                folders.probe_folder(name, path), self.judge.thresholds, needed
            )
        ]

    def _packages(self) -> list[Finding]:
        return packages.check_packages(self.request.config)


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


def this_node() -> str:
    """Name of this node."""
    return socket.gethostname()
