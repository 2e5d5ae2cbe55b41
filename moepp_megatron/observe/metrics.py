"""The record of one logged step, and reading a run's `metrics.jsonl`."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError

from moepp_megatron.catalogue import Record
from moepp_megatron.config.errors import ConfigError, first_misfit
from moepp_megatron.config.regular_file import check_regular

# Commands that only start something do not wait for numpy.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A hundred layers of a thousand experts are a tenth of it.
LONGEST_LINE = 1 << 24


class MetricsError(ConfigError):
    """A `metrics.jsonl` is missing, empty or damaged; the message is one line."""


class StepMetrics(Record):
    """One logged step (one line of `metrics.jsonl`); `catalogue.py` says what each key means.

    Further keys may be given; they are kept. Non-finite numbers are written as `null`, so that
    every line is standard JSON.
    """

    def to_json_line(self) -> str:
        """One line of JSON with its line end; optional values that are None are left out."""
        return self.model_dump_json(exclude_none=True) + "\n"


class _Line(NamedTuple):
    """A line of a `metrics.jsonl`: its bytes in the file, and its record or what is wrong."""

    number: int
    start: int
    end: int
    record: StepMetrics | None
    reason: str = ""


class Records(Sequence[StepMetrics]):
    """The records that count, each read from the file on access; each takes 16 bytes of memory.

    `steps`, [n] int64, strictly increase; `starts`, [n] int64, are the offsets of the lines. A
    record that a running training has meanwhile rewritten raises `MetricsError`.
    """

    def __init__(self, path: Path, steps: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        self.path, self.steps, self._starts = path, steps, starts

    def __len__(self) -> int:
        """Return their number."""
        return len(self.steps)

    def __getitem__(self, place: Any) -> Any:
        """Return one record, or `Records` for a slice or an array of indices."""
        if isinstance(place, int):
            return next(iter(self[[place]]))
        return Records(self.path, self.steps[place], self._starts[place])

    def __iter__(self) -> Iterator[StepMetrics]:
        """Yield each in turn; `MetricsError` if the file has changed."""
        try:
            with self.path.open("rb") as file:
                for step, start in zip(self.steps, self._starts, strict=True):
                    file.seek(start)
                    record = StepMetrics.model_validate_json(file.readline(LONGEST_LINE))
                    if record.step != step:
                        raise ValueError(f"step {step} has become step {record.step}")
                    yield record
        except (OSError, ValueError) as error:
            raise MetricsError(f"{self.path}: changed while it was read; try again") from error


def read_metrics(path: Path, *see: Callable[[StepMetrics], None]) -> Records:
    """Read a run's `metrics.jsonl`, of at least one record, in nearly constant memory.

    A last line that a killed run left unfinished is ignored. If steps were repeated after a
    restart, the later records count; `see` is called with every record in turn, also with the
    others. Raises MetricsError if the file is missing or has no complete record, or a line is not a
    record.
    """
    steps, starts = array("q"), array("q")
    try:
        for line in read_lines(path):
            if line.record is None:
                raise MetricsError(f"{path}:{line.number}: {line.reason}")
            steps.append(line.record.step)
            starts.append(line.start)
            for look in see:
                look(line.record)
    except OSError as error:
        raise MetricsError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that "
            "`moepp train` has started"
        ) from error
    if not steps:
        raise MetricsError(
            f"{path}: has no complete record yet; wait for the first logged step "
            "(training.log_interval)"
        )
    import numpy as np

    count = counting(np.asarray(steps))
    return Records(path, np.asarray(steps)[count], np.asarray(starts)[count])


def counting(steps: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n] bool: records that count, whose step no later record repeats or undoes."""
    import numpy as np

    later = np.minimum.accumulate(steps[::-1])[::-1]
    return np.append(steps[:-1] < later[1:], True)[: len(steps)]


def read_lines(path: Path) -> Iterator[_Line]:
    """Yield the lines of a `metrics.jsonl`, without empty ones and an unfinished last one.

    Too long a line comes in parts, which are no records. Raises OSError if the file is unreadable.
    """
    check_regular(path)
    with path.open("rb") as file:
        end = 0
        for number in itertools.count(1):
            start, line = end, file.readline(LONGEST_LINE)
            if not line:
                return
            end += len(line)
            try:
                if line.strip():
                    yield _Line(number, start, end, StepMetrics.model_validate_json(line))
            except ValidationError as error:
                # Only an interrupted write leaves bytes after the last line end.
                if line.endswith(b"\n") or len(line) == LONGEST_LINE:
                    yield _Line(number, start, end, None, _describe(error))


def _describe(error: ValidationError) -> str:
    """The first problem of a line, in one line."""
    key, reason = first_misfit(error)
    if not key:
        return f"is not a JSON object ({reason}); remove the line"
    return f"{key}: {reason}; every record needs the keys of StepMetrics"
