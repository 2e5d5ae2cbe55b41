"""Writes to TensorBoard: scalars, and histograms of a record's lists."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.observe.expert_names import ExpertCounts, layer_numbers
from moepp_megatron.observe.metrics import StepMetrics

logger = logging.getLogger(__name__)

HISTOGRAMS: Mapping[str, str] = {
    "expert_share": "expert_share/all_layers",
    "layer_expert_share": "expert_share/moe_layer",
    "ffn_histogram": "ffn_experts_per_token/all_layers",
    "layer_ffn_histogram": "ffn_experts_per_token/moe_layer",
}
"""Fields that are shown as histograms, and their tags; a list of lists gives one a MoE layer, with
the layer's number in the model behind the tag. Entry i of a list is the weight of i: of expert
number i, or of tokens that take i FFN experts. What a record does not have is left out."""

# TensorBoard itself shows about 50 histograms of a tag, picked from those that there are.
RECORDS_PER_HISTOGRAM = 10


class TensorBoardSink:
    """Writes scalars and histograms to a TensorBoard event folder."""

    GROUPS = {
        "loss": "loss/train",
        "valid_loss": "loss/validation",
        "balance_loss": "loss/balance",
        "z_loss": "loss/z",
        "lr": "optimizer/lr",
        "grad_norm": "optimizer/grad_norm",
        "num_zeros": "optimizer/num_zeros",
        "step_time_s": "speed/step_time_s",
        "tokens_per_s": "speed/tokens_per_s",
        "a2a_bytes": "speed/a2a_bytes",
        "slowest_rank_ratio": "speed/slowest_rank_ratio",
        "waiting_fraction": "speed/waiting_fraction",
        "skipped_steps": "optimizer/skipped_steps",
        "guard_actions": "router/guard_actions",
        "routing_shift": "router/routing_shift",
        "mfu": "speed/mfu",
        "model_tflops": "speed/model_tflops",
        "energy_j": "hardware/energy_j",
        "energy_per_token_j": "hardware/energy_per_token_j",
        "gpu_hours": "hardware/gpu_hours",
        "gpu_power_w": "hardware/gpu_power_w",
        "gpu_utilization": "hardware/gpu_utilization",
        "gpu_clock_mhz": "hardware/gpu_clock_mhz",
        "gpu_memory_bytes": "hardware/gpu_memory_bytes",
        "gpu_temperature_c": "hardware/gpu_temperature_c",
        "nvlink_bytes_per_s": "hardware/nvlink_bytes_per_s",
        "pcie_bytes_per_s": "hardware/pcie_bytes_per_s",
        "cpu_utilization": "hardware/cpu_utilization",
        "host_memory_bytes": "hardware/host_memory_bytes",
        "tokens": "speed/tokens",
        "ffn_fraction": "router/ffn_fraction",
        "ffn_target": "router/ffn_target",
        "tau": "router/tau",
        "ffn_per_token": "router/ffn_per_token",
        "max_ffn_load": "router/max_ffn_load",
        "dropped_fraction": "router/dropped_fraction",
    }

    def __init__(
        self,
        folder: Path,
        experts: ExpertCounts,
        resume_step: int | None = None,
        moe_layers: Sequence[int] = (),
    ) -> None:
        """Opens the sink.

        Args:
            folder: ``RUN/tensorboard``.
            experts: Names the entries of ``expert_share``.
            resume_step: The first step that will be written from now on; TensorBoard hides
                events of an earlier attempt from there on.
            moe_layers: Numbers of the MoE layers in the model, from 1; by default 1, 2, ...

        Raises:
            ImportError: If tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard output needs the tensorboard package; pip install tensorboard"
            ) from error
        self._names = experts.names
        self._moe_layers = moe_layers
        self._records = 0
        self._open = functools.partial(SummaryWriter, str(folder))
        _quiet_writer_thread()
        self._writer: Any = self._open(purge_step=resume_step)

    def write(self, record: StepMetrics) -> None:
        """Writes every number of the record, the shares by expert and MoE layer, histograms.

        Histograms are written of the first record, every tenth after it, and those with router
        health. Events that a full disk refuses are missing here, but not in ``metrics.jsonl``.
        """
        try:
            if self._writer is None:
                self._writer = self._open()
            self._write(record)
        except OSError as error:
            # The writer has no thread any more; the next record gets a new one and a new file.
            self._writer = None
            logger.warning("step %d: TensorBoard misses records: %s", record.step, error)

    def go_back(self, step: int) -> None:
        """Make TensorBoard hide the events of later steps."""
        self.close()
        self._writer = self._open(purge_step=step + 1)

    def _write(self, record: StepMetrics) -> None:
        values = record.model_dump(exclude_none=True)
        for key, value in values.items():
            if isinstance(value, int | float) and key != "step":
                self._scalar(self.GROUPS.get(key, f"other/{key}"), value, record.step)
        for name, share in zip(self._names, record.expert_share, strict=True):
            self._scalar(f"expert_share/{name.replace(' ', '_')}", share, record.step)
        for layer, fraction in self._by_layer(record.layer_ffn_fraction or ()):
            self._scalar(f"layer_ffn_fraction/moe_layer_{layer}", fraction, record.step)
        for metric, layers in (record.router_health or {}).items():
            for layer, value in self._by_layer(layers):
                self._scalar(f"router_health/{metric}/moe_layer_{layer}", value, record.step)
        for count, loss in enumerate(record.loss_by_ffn or ()):
            if math.isfinite(loss):
                self._scalar(f"loss_by_ffn_experts/{count}", loss, record.step)
        is_measured = record.router_health is not None
        if is_measured or self._records % RECORDS_PER_HISTOGRAM == 0:
            for key, tag in HISTOGRAMS.items():
                self._histograms(tag, values.get(key) or (), record.step)
        self._records += 1

    def _by_layer(self, values: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        return zip(layer_numbers(self._moe_layers, len(values)), values, strict=True)

    def _histograms(self, tag: str, weights: Sequence[Any], step: int) -> None:
        """Write one histogram, or one per MoE layer."""
        if weights and isinstance(weights[0], list | tuple):
            for layer, row in self._by_layer(weights):
                self._histogram(f"{tag}_{layer}", row, step)
        else:
            self._histogram(tag, weights, step)

    def _histogram(self, tag: str, weights: Sequence[float], step: int) -> None:
        """Write a histogram of the whole numbers from 0 on; nothing if a weight is not finite.

        Args:
            tag: Its name.
            weights: [n] the weight of each number.
            step: The record's step.
        """
        if not weights or not all(math.isfinite(weight) for weight in weights):
            return
        n = len(weights)
        self._writer.add_histogram_raw(
            tag,
            min=-0.5,
            max=n - 0.5,
            num=sum(weights),
            sum=sum(i * weight for i, weight in enumerate(weights)),
            sum_squares=sum(i * i * weight for i, weight in enumerate(weights)),
            bucket_limits=[i + 0.5 for i in range(n)],
            bucket_counts=list(weights),
            global_step=step,
        )

    def _scalar(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        if self._writer is not None:
            self._writer.close()


def _quiet_writer_thread() -> None:
    """Keep TensorBoard's thread from printing a traceback where the disk is full.

    It raises the same error once more in the thread that writes.
    """
    hook = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        is_theirs = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_theirs and isinstance(args.exc_value, OSError)):
            hook(args)

    threading.excepthook = report
