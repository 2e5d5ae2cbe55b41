"""The table of layouts of the matrix and of long tests; the record of the last green run of all.

The table ends a run. `./launch/test.sh --last-green` shows the record.
"""

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

LAST_GREEN = Path(__file__).with_name("last_green.json")

# Marks of what `./launch/test.sh -m 'matrix or slow'` runs.
LONG = ("matrix", "slow")
_HEAD = ("", "ranks", "loss error", "gradient error", "seconds", "measured", "result")


def lines_of(stats: Mapping[str, list[pytest.TestReport]]) -> list[str]:
    """The table, by ranks and name; nothing where no such test ran."""
    found = [
        (report, word)
        for outcome, word in (("passed", "pass"), ("failed", "FAIL"))
        for report in stats.get(outcome, [])
        if getattr(report, "when", "") == "call" and _is_row(report)
    ]
    if not found:
        return []
    rows = sorted(_row(report, word) for report, word in found)
    passed = sum(word == "pass" for _, word in found)
    worst = [_largest([report for report, _ in found], name) for name in ("loss", "gradient")]
    seconds = f"{sum(report.duration for report, _ in found):.0f}"
    total = (
        f"{passed} of {len(rows)} pass",
        "",
        *worst,
        seconds,
        "",
        "pass" if passed == len(rows) else "FAIL",
    )
    table = [_HEAD, *(row for _, row in rows), total]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEAD))]
    return ["", *("  ".join(_aligned(line, widths)).rstrip() for line in table)]


def record(config: pytest.Config, stats: Mapping[str, list[Any]], path: Path = LAST_GREEN) -> None:
    """Write down that all long tests passed, if this run left none of them out."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not config.option.quick
    left_out = any(
        item.get_closest_marker(mark) for item in stats.get("deselected", []) for mark in LONG
    )
    passed = [each for each in stats.get("passed", []) if each.when == "call" and _is_row(each)]
    if not whole or left_out or not passed or stats.get("failed") or stats.get("error"):
        return
    commit = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    found = subprocess.run(commit, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": found.stdout.strip(),
        "passed": len(passed),
        "skipped": sorted(each.nodeid for each in stats.get("skipped", []) if _is_row(each)),
        "minutes": round(sum(each.duration for each in passed) / 60, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core")},
    }
    path.write_text(json.dumps(said, indent=1) + "\n", encoding="ascii")


def _is_row(report: pytest.TestReport) -> bool:
    return "cell" in dict(report.user_properties) or any(mark in report.keywords for mark in LONG)


def _row(report: pytest.TestReport, word: str) -> tuple[tuple[int, str], tuple[str, ...]]:
    """What rows are sorted by, and a row."""
    said = dict(report.user_properties)
    file, _, test = report.nodeid.partition("::")
    name = str(said.get("cell", f"{file.removeprefix('tests/')} {test}"))
    ranks = int(str(said.get("ranks", 0)))
    row = (
        name,
        str(ranks or "-"),
        _number(said, "loss"),
        _number(said, "gradient"),
        f"{report.duration:.0f}",
        str(said.get("measured", "")),
        word,
    )
    return (ranks, name), row


def _number(said: Mapping[str, object], name: str) -> str:
    """A difference, or a dash where the run did not get that far or measures none."""
    return f"{said[name]:.1e}" if name in said else "-"


def _largest(reports: list[pytest.TestReport], name: str) -> str:
    numbers = [dict(report.user_properties).get(name) for report in reports]
    return f"{max((float(str(each)) for each in numbers if each is not None), default=0.0):.1e}"


def _aligned(line: tuple[str, ...], widths: list[int]) -> list[str]:
    """Names and words to the left, numbers to the right."""
    is_text = (0, 5, 6)
    return [
        cell.ljust(width) if column in is_text else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
