"""The record of one logged step, and reading a run's ``metrics.jsonl``."""

from pathlib import Path

from pydantic import ValidationError

from moepp_megatron.catalogue import Record
from moepp_megatron.config.regular_file import check_regular


class MetricsError(ValueError):
    """A ``metrics.jsonl`` is missing, empty or damaged; the message is one line."""


class StepMetrics(Record):
    """One logged step (one line of ``metrics.jsonl``); `catalogue.py` says what each key means.

    Further keys may be given; they are kept. Non-finite numbers are written as ``null``, so that
    every line is standard JSON.
    """

    def to_json_line(self) -> str:
        """One line of JSON with its line end; optional values that are None are left out."""
        return self.model_dump_json(exclude_none=True) + "\n"


def read_metrics(path: Path) -> list[StepMetrics]:
    """Reads a run's ``metrics.jsonl``.

    A last line that a killed run left unfinished is ignored. If steps were repeated after a
    restart, the later records count.

    Returns:
        At least one record, steps strictly increasing.

    Raises:
        MetricsError: The file is missing, has no complete record, or a line is not a record.
    """
    try:
        check_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise MetricsError(
            f"{path}: cannot be read ({error.strerror}); name the folder of a run that "
            "`moepp train` has started"
        ) from error
    records, damaged = scan_metrics(content)
    for number, reason in damaged.items():
        raise MetricsError(f"{path}:{number}: {reason}")
    if not records:
        raise MetricsError(
            f"{path}: has no complete record yet; wait for the first logged step "
            "(training.log_interval)"
        )
    return records


def scan_metrics(content: bytes) -> tuple[list[StepMetrics], dict[int, str]]:
    """The records of a ``metrics.jsonl``, and the errors of invalid lines.

    Returns:
        Records with strictly increasing steps; line number (from 1) to reason. An unfinished last
        line is in neither.
    """
    lines = content.split(b"\n")
    records: list[StepMetrics] = []
    damaged: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = StepMetrics.model_validate_json(line)
        except ValidationError as error:
            # Only an interrupted write leaves bytes after the last line end.
            if number < len(lines):
                damaged[number] = _describe(error)
            continue
        while records and records[-1].step >= record.step:
            records.pop()
        records.append(record)
    return records, damaged


def _describe(error: ValidationError) -> str:
    """The first problem of a line, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return f"is not a JSON object ({first['msg']}); remove the line"
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}; every record needs the keys of StepMetrics"
