"""The one way to a run's numbers over its steps."""

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import repeat
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from moepp_megatron.catalogue import IN_LAYERS, OF_RECORD
from moepp_megatron.experts import FFN, KINDS, ExpertCounts
from moepp_megatron.observe.metrics import StepMetrics, counting
from moepp_megatron.observe.numbers import name_of

# Of the others, which have no plot of their own, a million values each would only take memory.
_USED = {"step", "tokens", "loss", "valid_loss", "ffn_fraction", "ffn_target", "a2a_bytes"}
_USED |= {"gpu_hours", "energy_j", "source_tokens"}
_KEPT = [key for key, row in OF_RECORD.items() if row.drawn is not None or key in _USED]
_PLAIN = [key for key in _KEPT if not OF_RECORD[key].axes]
# What layers and experts have is summed up: it may be thousands of numbers a record.
_BY_NAME = [key for key in _KEPT if OF_RECORD[key].axes]
_NESTED = [*_BY_NAME, "router_health", "layer_ffn_histogram", "expert_share", "layer_expert_share"]
_KNOWN = {*_KEPT, *_NESTED, *IN_LAYERS, "kind_share"}
BAND = ("low", "mean", "high")
"""The least, the mean and the greatest of the MoE layers' finite numbers."""
_NOT_OF_THE_FIRST_LAYER = ("residual_ratio",)


class Series(NamedTuple):
    """A number over steps, finite everywhere."""

    x: np.ndarray
    y: np.ndarray


def finite(x: np.ndarray, y: np.ndarray) -> Series:
    """The points of which both numbers are finite."""
    kept = np.isfinite(x) & np.isfinite(y)
    return Series(x, y) if kept.all() else Series(x[kept], y[kept])


class Numbers:
    """The numbers of a run's records in columns: some 250 MB for a million records.

    `experts` are those of an MoE layer; without them nothing is summed up of them.
    """

    def __init__(
        self, experts: ExpertCounts | None = None, records: Iterable[StepMetrics] = ()
    ) -> None:
        self._kinds = {
            kind.name: experts.columns(kind) for kind in KINDS if experts and experts.count(kind)
        }
        # Up to the last record that has the number.
        self._columns = defaultdict[tuple[str, str], "array[float]"](lambda: array("d"))
        self._count = 0
        for record in records:
            self.add(record)

    def add(self, record: StepMetrics) -> None:
        """Take the next record of the file."""
        fields = vars(record)
        for key in _PLAIN:
            if fields[key] is not None:
                self._put(key, "", fields[key])
        for key in _NESTED:
            if fields[key]:
                self._add_nested(key, fields[key])
        self._count += 1

    def _add_nested(self, key: str, value: Any) -> None:
        if key == "expert_share":
            if all(map(math.isfinite, value)):
                for kind, places in self._kinds.items():
                    self._put("kind_share", kind, sum(value[places]))
            return
        if key == "layer_expert_share":
            if FFN.name in self._kinds:
                ffn = self._kinds[FFN.name]
                self._add_band("min_ffn_load", [min_over_mean(layer[ffn]) for layer in value])
            return
        self._put(key, "", 1.0)
        if key in _BY_NAME:
            if not isinstance(value, dict):
                row = OF_RECORD[key]
                value = {name_of(row, (str(n),)): number for n, number in enumerate(value)}
            for name, number in value.items():
                self._put(key, name, number)
        elif key == "router_health":
            for name, layers in value.items():
                if name in IN_LAYERS:
                    self._add_band(name, layers[name in _NOT_OF_THE_FIRST_LAYER :])

    def _add_band(self, key: str, layers: Sequence[float]) -> None:
        known = [value for value in layers if math.isfinite(value)]
        if known:
            for name, value in zip(BAND, (min(known), fmean(known), max(known)), strict=True):
                self._put(key, name, value)

    def _put(self, key: str, name: str, value: float) -> None:
        """Set a number of the record that is being added; NaN in those before that lack it."""
        column = self._columns[key, name]
        column.extend(repeat(math.nan, self._count - len(column)))
        column.append(value)

    def _column(self, key: str, name: str) -> np.ndarray:
        """[all records] float64, NaN where there is none."""
        column, known = np.full(self._count, math.nan), self._columns.get((key, name), ())
        column[: len(known)] = known
        return column

    def names(self, key: str) -> list[str]:
        """The names under a key, in the order in which they came."""
        return [name for of, name in self._columns if of == key and name]

    def values(self, key: str, name: str = "") -> np.ndarray:
        """A number of each record that counts, [n] float64; NaN where it was not recorded.

        Where the key holds numbers by name, such as that of a data source, `name` chooses one;
        without it such a key has 1 where it was recorded. Each kind of expert's share of the
        selections is under `kind_share`; under a name of `IN_LAYERS` are the `BAND` of the MoE
        layers.
        """
        assert key in _KNOWN, f"{key} is not kept"
        return self._column(key, name)[self._is_counted]

    @cached_property
    def _is_counted(self) -> np.ndarray:
        return counting(self._column("step", ""))

    def series(self, key: str, name: str = "") -> Series:
        """The finite ones of these numbers, with their steps."""
        return finite(self.values("step"), self.values(key, name))


def min_over_mean(values: Sequence[float]) -> float:
    """The least over the mean; NaN where that is not positive."""
    return min(values) * len(values) / sum(values) if sum(values) > 0 else math.nan


def mean_of(rows: Iterable[Any]) -> np.ndarray | None:
    """[...] float64 mean of lists, of as many as have the last one's shape; None without one."""
    total, count = np.zeros(0), 0
    for row in rows:
        try:
            table = np.asarray(row, dtype=np.float64)
        except ValueError:
            # Lists of unequal lengths, which nobody has measured.
            continue
        if table.shape != total.shape:
            total, count = np.zeros(table.shape), 0
        total += table
        count += 1
    return total / count if count else None
