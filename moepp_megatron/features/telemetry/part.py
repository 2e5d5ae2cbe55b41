"""Adds telemetry of all nodes to a step's metrics."""

import logging
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.hardware import Hardware, find_hardware, load_hardware
from moepp_megatron.features.telemetry.sampler import (
    NOTHING,
    CpuSource,
    GpuSource,
    Sampler,
    Source,
    Usage,
)
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.signals import StopRequest
from moepp_megatron.training.step_sums import sum_over_ranks

logger = logging.getLogger(__name__)


class TelemetryPart(Part):
    """Samples on the first rank of every node."""

    def __init__(self, run: PartContext) -> None:
        self._config, self._tokens = run.config, run.progress.tokens
        self._on_gpu = torch.cuda.is_available()
        self._sampler: Sampler | None = None
        self._hardware = _hardware(run.config, self._on_gpu)

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if the machine is sampled."""
        return run.config.telemetry.interval_s > 0

    def begin(self, progress: Callable[[], Progress], stop: StopRequest) -> None:
        """Start; samples from here on belong to the next record. A collective."""
        uuids = _cards_of_this_node(self._on_gpu)
        if uuids is not None:
            self._sampler = Sampler(_source(uuids), self._config.telemetry.interval_s)
            self._sampler.start()

    def close(self) -> None:
        """Stop sampling."""
        if self._sampler is not None:
            self._sampler.stop()

    def record(self, step: Step, fields: Fields) -> Fields:
        """Usage since the record before, and the efficiency of the step; a collective."""
        tokens = step.progress.tokens
        usage = _over_ranks(NOTHING if self._sampler is None else self._sampler.take())
        new_tokens, self._tokens = tokens - self._tokens, tokens
        # After a rollback there may be fewer tokens than before.
        metrics = usage.metrics(max(new_tokens, 0))
        return metrics | self._efficiency(fields["tokens_per_s"], fields["ffn_fraction"])

    def _efficiency(self, tokens_per_s: float, ffn_fraction: float) -> dict[str, float]:
        flops = training_flops_per_token(self._config, ffn_fraction)
        tflops = flops * tokens_per_s / dist.get_world_size() / 1e12
        precision = self._config.precision
        peak = None
        if self._hardware is not None:
            peak = self._hardware.peak_tflops(precision.dtype, precision.fp8)
        return {"model_tflops": tflops} | ({} if peak is None else {"mfu": tflops / peak})


def _over_ranks(usage: Usage) -> Usage:
    """The devices of all nodes; two all-reduces of a dozen numbers."""
    sums = sum_over_ranks(torch.tensor(usage.sums, dtype=torch.float64))
    device = torch.cuda.current_device()
    highest = torch.tensor(usage.highest, dtype=torch.float64, device=device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return Usage(sums.tolist(), highest.tolist())


def _cards_of_this_node(on_gpu: bool) -> list[str] | None:
    """UUIDs of the GPUs of this node's ranks, on its first rank; None on the others."""
    uuid = None
    if on_gpu:
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    node = socket.gethostname()
    ranks = gathered((node, uuid))
    if [there for there, _ in ranks].index(node) != dist.get_rank():
        return None
    return list(dict.fromkeys(card for there, card in ranks if there == node and card))


def _source(uuids: list[str]) -> Source:
    if uuids:
        try:
            return GpuSource(uuids, Nvml())
        except NvmlUnavailableError as error:
            logger.warning("no telemetry of the GPUs: %s", error)
    return CpuSource()


def _hardware(config: Config, on_gpu: bool) -> Hardware | None:
    if config.telemetry.hardware is not None:
        return load_hardware(config.telemetry.hardware)
    return find_hardware(torch.cuda.get_device_name()) if on_gpu else None
