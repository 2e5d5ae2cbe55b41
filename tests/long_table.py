"""The table that ends a run with layouts of the matrix or long tests: one row each, and a total."""

from collections.abc import Mapping

import pytest

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
