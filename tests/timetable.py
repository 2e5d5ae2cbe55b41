"""The whole suite on several workers: who runs what when, how far it is, how long it still takes.

`./launch/test.sh` runs the tests on several workers (tests/workers.py). The tests of one file stay
together, for they share models, ranks and browsers, and so do those of some folders; the longest
come first, so that none is left over for one worker at the end. Slurm's come before all others,
each file with a cluster of its own: they wait most of the time, beside which the other workers
compute. `durations.json` says how long each file took; it is written anew by
`./launch/test.sh --record-durations`.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

DURATIONS = Path(__file__).parent / "durations.json"
# What waits most of the time.
FIRST = "tests/slurm/"
# Folders whose tests stay with one worker: they share a process that has imported transformers, and
# a run whose report has been drawn.
TOGETHER = ["tests/interop/", "tests/unit/tools/report/"]
# A new file, until its duration is recorded: seconds a test.
UNKNOWN_S = 0.3
# A line of progress at most this often.
_LINE_EVERY_S = 10.0


def unit_of(node_id: str) -> str:
    """What is run as one piece by one worker: a file, or a folder of `TOGETHER`."""
    file = _file_of(node_id)
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def _file_of(node_id: str) -> str:
    return node_id.split("::", 1)[0]


def recorded() -> dict[str, float]:
    """Seconds by file, as the last record has them."""
    seconds: dict[str, float] = json.loads(DURATIONS.read_text(encoding="ascii"))
    return seconds


def longest_first(items: list[pytest.Item]) -> None:
    """Order the units of the items, those of `FIRST` first; within a unit nothing moves."""
    expected = expected_seconds(item.nodeid for item in items)
    items.sort(key=lambda item: _urgency(unit_of(item.nodeid), expected))


def expected_seconds(node_ids: Iterable[str]) -> dict[str, float]:
    """Seconds that each unit of these tests will take."""
    known = recorded()
    seconds: defaultdict[str, float] = defaultdict(float)
    for file, count in Counter(map(_file_of, node_ids)).items():
        seconds[unit_of(file)] += known.get(file, UNKNOWN_S * count)
    return dict(seconds)


def _urgency(unit: str, expected: dict[str, float]) -> tuple[bool, float, str]:
    return not unit.startswith(FIRST), -expected[unit], unit


class Progress:
    """Says how far the workers are, and shows each failure when it happens."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._seconds: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._total = 0
        self._done_s = 0.0
        self._begin = self._last_line = time.monotonic()
        self._took: defaultdict[str, float] = defaultdict(float)

    def starts_with(self, node_ids: list[str]) -> None:
        """The workers have collected."""
        self._seconds = expected_seconds(node_ids)
        self._counts = Counter(unit_of(node_id) for node_id in node_ids)
        self._total = len(node_ids)
        self._begin = self._last_line = time.monotonic()

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        """No dots: lines of progress take their place."""
        if self._config.option.verbose > 0 or report.failed or hasattr(report, "wasxfail"):
            return None
        if report.passed:
            return ("passed" if report.when == "call" else "", "", "")
        return ("skipped", "", "SKIPPED")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        unit = unit_of(report.nodeid)
        self._took[_file_of(report.nodeid)] += report.duration
        if report.failed:
            self._outcomes["failed"] += 1
            self._show(report)
        if report.when == "teardown":
            self._outcomes["done"] += 1
            self._done_s += self._seconds.get(unit, 0.0) / max(1, self._counts[unit])
            if time.monotonic() - self._last_line >= _LINE_EVERY_S:
                self._last_line = time.monotonic()
                self._write(self.line())

    def line(self) -> str:
        """How far it is, and how long it takes if the rest is as fast as what was."""
        done, failed = self._outcomes["done"], self._outcomes["failed"]
        elapsed = time.monotonic() - self._begin
        total_s = sum(self._seconds.values())
        share = self._done_s / total_s if total_s else 1.0
        left = elapsed * (1 - share) / share if share else 0.0
        shown = f"{failed} failed" if failed else "none failed"
        return (
            f"[{100 * share:3.0f}%] {done} of {self._total} tests, {shown}; "
            f"{_clock(elapsed)} so far, about {_clock(left)} left"
        )

    def record(self) -> None:
        """Write down how long each file took."""
        seconds = {file: round(took, 1) for file, took in sorted(self._took.items())}
        DURATIONS.write_text(json.dumps(seconds, indent=0) + "\n", encoding="ascii")

    def _show(self, report: pytest.TestReport) -> None:
        self._write(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}\n")

    def _write(self, text: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(text)
            terminal.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
