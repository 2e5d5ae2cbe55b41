"""Writes to TensorBoard: scalars, and histograms of a record's lists."""

from __future__ import annotations

import functools
import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.catalogue import BY_NAME, OF_RECORD
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.observe.layer_numbers import layer_numbers
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.runtime.install import how_to_install

logger = logging.getLogger(__name__)

_GROUPS = {key: row.group for key, row in OF_RECORD.items()}
_HISTOGRAMS: Mapping[str, str] = {
    "expert_share": f"{_GROUPS['expert_share']}/all_layers",
    "layer_expert_share": f"{_GROUPS['layer_expert_share']}/moe_layer",
    "ffn_histogram": f"{_GROUPS['layer_ffn_histogram']}/all_layers",
    "layer_ffn_histogram": f"{_GROUPS['layer_ffn_histogram']}/moe_layer",
}
"""Fields that are shown as histograms, and their tags; a list of lists gives one a MoE layer, with
the layer's number in the model behind the tag. Entry i of a list is the weight of i: of expert
number i, or of tokens that take i FFN experts. What a record does not have is left out."""

# TensorBoard itself shows about 50 histograms of a tag, picked from those that there are.
_RECORDS_PER_HISTOGRAM = 10


class TensorBoardSink:
    """Writes scalars and histograms to a TensorBoard event folder."""

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
                f"TensorBoard output needs the tensorboard package; {how_to_install('tensorboard')}"
            ) from error
        self._names = experts.names
        self._moe_layers = moe_layers
        self._records = 0
        self._folder = folder
        self._open = functools.partial(SummaryWriter, str(folder))
        _quiet_writer_thread()
        self._writer: Any = self._open(purge_step=resume_step)

    def write(self, record: StepMetrics) -> None:
        """Writes every number of the record, the shares by expert and MoE layer, histograms.

        Histograms are written of the first record, every tenth after it, and those with router
        health. Events that a full disk refuses are missing here, but not in ``metrics.jsonl``.
        """
        try:
            if not self._folder.is_dir():
                # Removed or renamed: what is open has no name any more.
                self.close()
                self._writer = None
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
                self._scalar(tag_of(key), value, record.step)
        group = _GROUPS["expert_share"]
        for name, share in zip(self._names, record.expert_share, strict=True):
            self._scalar(f"{group}/{name.replace(' ', '_')}", share, record.step)
        group = _GROUPS["layer_ffn_fraction"]
        for layer, fraction in self._by_layer(record.layer_ffn_fraction or ()):
            self._scalar(f"{group}/moe_layer_{layer}", fraction, record.step)
        group = _GROUPS["router_health"]
        for metric, layers in (record.router_health or {}).items():
            for layer, value in self._by_layer(layers):
                self._scalar(f"{group}/{metric}/moe_layer_{layer}", value, record.step)
        for count, loss in enumerate(record.loss_by_ffn or ()):
            if math.isfinite(loss):
                self._scalar(f"{_GROUPS['loss_by_ffn']}/{count}", loss, record.step)
        for key in BY_NAME:
            for name, value in (values.get(key) or {}).items():
                self._scalar(f"{_GROUPS[key]}/{name.replace(' ', '_')}", value, record.step)
        group = _GROUPS["source_expert_share"]
        for source, shares in (record.source_expert_share or {}).items():
            for name, share in zip(self._names, shares, strict=True):
                tag = f"{group}/{source}/{name}".replace(" ", "_")
                self._scalar(tag, share, record.step)
        is_measured = record.router_health is not None
        if is_measured or self._records % _RECORDS_PER_HISTOGRAM == 0:
            for key, tag in _HISTOGRAMS.items():
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


def tag_of(key: str) -> str:
    """The tag of a record's number in TensorBoard: the catalogue's, if it has one."""
    group = _GROUPS.get(key, "other")
    return group if "/" in group else f"{group}/{key}"


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
