"""Where the time of the tests goes: a pytest plugin that records it, and a table of it.

    python -m pytest -p benchmarks.test_times --times times.jsonl
    python -m benchmarks.test_times times.jsonl

Of each phase of each test: wall time, computing of pytest's own process, computing of everything it
started (ranks, commands, browsers; under Slurm the daemons only, whose jobs are nobody's children),
and which processes it started itself. What is neither is waiting, or other work of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

_STARTED: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to."""
    parser.addoption("--times", type=Path, help="file for the times of every phase of every test")


def pytest_configure(config: pytest.Config) -> None:
    """Note every process that a test starts."""
    if config.option.times is None:
        return
    begin = subprocess.Popen.__init__

    def noting(self: Any, args: Any, *rest: Any, **named: Any) -> None:
        _STARTED.append(args if isinstance(args, str) else " ".join(map(str, args)))
        begin(self, args, *rest, **named)

    subprocess.Popen.__init__ = noting  # type: ignore[method-assign]


def _computed() -> tuple[float, float]:
    """Seconds of computing so far: of this process, of all that it has started."""
    mine = os.times()
    others = mine.children_user + mine.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.Error:
            continue
        others += times.user + times.system + times.children_user + times.children_system
    return mine.user + mine.system, others


def _phase(item: pytest.Item, when: str) -> Generator[None, Any, Any]:
    _STARTED.clear()
    own, others = _computed()
    begin = time.perf_counter()
    try:
        return (yield)
    finally:
        wall = time.perf_counter() - begin
        now = _computed()
        record = {
            "test": item.nodeid,
            "when": when,
            "wall": round(wall, 3),
            "own": round(now[0] - own, 3),
            "others": round(now[1] - others, 3),
            "started": [each[:120] for each in _STARTED],
        }
        if item.config.option.times is not None:
            # Not Path.open, which some tests replace.
            with open(item.config.option.times, "a", encoding="utf-8") as file:  # noqa: PTH123
                file.write(json.dumps(record) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fixtures."""
    return (yield from _phase(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """The test."""
    return (yield from _phase(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """What comes after."""
    return (yield from _phase(item, "teardown"))


def kind_of(record: dict[str, Any]) -> str:
    """What a phase spends its time with."""
    started = " ".join(record["started"])
    if record["test"].startswith("tests/slurm/"):
        return "Slurm"
    if "playwright" in started or "in_browser" in record["test"]:
        return "Chromium"
    if "runtime.agent" in started or "--nproc" in started or "torch.distributed.run" in started:
        return "commands with ranks of torchrun"
    if "-m pytest" in started:
        return "pytest in pytest"
    if "python" in started:
        return "other commands and interpreters"
    if record["others"] > record["own"]:
        return "ranks of the pools"
    return "pytest's own process"


def table(records: list[dict[str, Any]]) -> list[str]:
    """One row a kind, the largest first."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    tests: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        row = sums[kind_of(record)]
        row[0] += record["wall"]
        row[1] += record["own"] + record["others"]
        row[2] += len(record["started"])
        tests[kind_of(record)].add(record["test"])
    sums["all"] = [sum(row[column] for row in sums.values()) for column in range(3)]
    lines = ["| | tests | wall (s) | computing (s) | processes started |", "|---|---|---|---|---|"]
    for kind, (wall, computed, started) in sorted(sums.items(), key=lambda row: -row[1][0]):
        count = len(tests[kind]) or len({record["test"] for record in records})
        lines.append(f"| {kind} | {count} | {wall:.0f} | {computed:.0f} | {started:.0f} |")
    return lines


def main() -> None:
    """Print the table of a recorded run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("times", type=Path)
    lines = parser.parse_args().times.read_text(encoding="utf-8").splitlines()
    print("\n".join(table([json.loads(line) for line in lines])))


if __name__ == "__main__":
    main()
