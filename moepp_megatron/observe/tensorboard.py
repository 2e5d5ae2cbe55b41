"""Writes to TensorBoard: scalars, and histograms of a record's lists."""

import functools
import logging
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.catalogue import OF_RECORD
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import is_curve, numbers, path_of
from moepp_megatron.runtime.optional import how_to_install

logger = logging.getLogger(__name__)

# TensorBoard itself shows about 50 histograms of a tag, picked from those that there are.
_RECORDS_PER_HISTOGRAM = 10
# Of TensorBoard's thread: a full disk, and a clock set back so far that no wait reaches it.
_OF_THREAD = (OSError, OverflowError)
_FLUSH_S = 120.0


class TensorBoardSink:
    """Writes scalars and histograms to a TensorBoard event folder."""

    def __init__(
        self,
        folder: Path,
        experts: ExpertCounts,
        resume_step: int | None = None,
        moe_layers: Sequence[int] = (),
    ) -> None:
        """Open the sink; raise ImportError if tensorboard is not installed.

        TensorBoard hides events of an earlier attempt from `resume_step`, the first step that will
        be written, on. `moe_layers` is that of `numbers`.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoard output needs the tensorboard package; {how_to_install('tensorboard')}"
            ) from error
        self._experts = experts
        self._moe_layers = moe_layers
        self._records = 0
        self._flushed = time.monotonic()
        self._folder = folder
        self._open = functools.partial(SummaryWriter, str(folder))
        _quiet_writer_thread()
        self._writer: Any = self._open(purge_step=resume_step)

    def write(self, record: StepMetrics) -> None:
        """Write every number of the record, and histograms of its distributions.

        Histograms are written of the first record, every tenth after it, and those with router
        health. Events that a full disk refuses are missing here, but not in `metrics.jsonl`.
        """
        try:
            if not self._folder.is_dir():
                # Removed or renamed: what is open has no name any more.
                self.close()
                self._writer = None
            if self._writer is None:
                self._writer = self._open()
            self._write(record)
            if time.monotonic() - self._flushed > _FLUSH_S:
                self._writer.flush()
                self._flushed = time.monotonic()
        except _OF_THREAD as error:
            # The writer has no thread any more; the next record gets a new one and a new file.
            self._writer = None
            logger.warning("step %d: TensorBoard misses records: %s", record.step, error)

    def go_back(self, step: int) -> None:
        """Make TensorBoard hide the events of later steps."""
        self.close()
        self._writer = self._open(purge_step=step + 1)

    def _write(self, record: StepMetrics) -> None:
        weights: dict[str, list[float]] = {}
        for key, labels, value in numbers(record, self._experts, self._moe_layers):
            if not labels and key != "step":
                self._writer.add_scalar(_tag_of(key), value, record.step)
            if labels:
                row = OF_RECORD[key]
                path = path_of(row, labels)
                if row.is_distribution:
                    whole = "/".join([row.group, *(path[:-1] or ["all_layers"])])
                    weights.setdefault(whole, []).append(value)
                if is_curve(row) and math.isfinite(value):
                    self._writer.add_scalar("/".join([row.group, *path]), value, record.step)
        is_measured = record.router_health is not None
        if is_measured or self._records % _RECORDS_PER_HISTOGRAM == 0:
            for tag, of_entries in weights.items():
                self._histogram(tag, of_entries, record.step)
        self._records += 1

    def _histogram(self, tag: str, weights: Sequence[float], step: int) -> None:
        """Write weights of 0, 1, ... (experts, or counts of them); nothing if one is not finite."""
        if not all(math.isfinite(weight) for weight in weights):
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

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


def _tag_of(key: str) -> str:
    """The tag of a record's number in TensorBoard: the catalogue's, if it has one."""
    group = OF_RECORD[key].group if key in OF_RECORD else "other"
    return group if "/" in group else f"{group}/{key}"


def _quiet_writer_thread() -> None:
    """Keep TensorBoard's thread from printing a traceback where the disk is full."""
    hook = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        is_theirs = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_theirs and isinstance(args.exc_value, _OF_THREAD)):
            hook(args)

    threading.excepthook = report
