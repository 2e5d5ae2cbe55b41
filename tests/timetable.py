"""Schedules the test files: the longest first, each with one worker (pytest-xdist).

The tests of a file stay together, for they share models, ranks and browsers, and so do those of
some folders. `durations.json` says how long each file took; it is written anew by
`./launch/test.sh --record-durations`.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

DURATIONS = Path(__file__).parent / "durations.json"
# Folders whose tests stay with one worker: they share a process that has imported transformers, and
# a run whose report has been drawn. Slurm's wait most of the time, beside which others compute.
TOGETHER = ["tests/interop/", "tests/slurm/", "tests/unit/tools/report/"]
# A new file, until its duration is recorded: seconds a test.
UNKNOWN_S = 0.3


def unit_of(node_id):
    """Return the unit that one worker runs as a whole: a file, or a folder of `TOGETHER`."""
    file = _file_of(node_id)
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


def _file_of(node_id):
    return node_id.split("::", 1)[0]


def recorded():
    """Seconds by file, as the last record has them."""
    seconds = json.loads(DURATIONS.read_text(encoding="ascii"))
    return seconds


def longest_first(items):
    """Order the units of the items; within a unit nothing moves."""
    known = recorded()
    expected = defaultdict(float)
    for file, count in Counter(_file_of(item.nodeid) for item in items).items():
        expected[unit_of(file)] += known.get(file, UNKNOWN_S * count)
    items.sort(key=lambda item: (-expected[unit_of(item.nodeid)], unit_of(item.nodeid)))


def scheduler(config, log):
    """Give each worker the next unit."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit_of(nodeid)

    return Units(config, log)


class Record:
    """Writes down how long each file took."""

    def __init__(self):
        self._took = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        self._took[_file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self):
        seconds = {file: round(took, 1) for file, took in sorted(self._took.items())}
        DURATIONS.write_text(json.dumps(seconds, indent=0) + "\n", encoding="ascii")
