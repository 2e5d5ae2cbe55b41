"""A corpus for runs on test ranks; the table that ends a run of the layout matrix."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console

from moepp_megatron.data.prepare import PrepareSettings, prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "source.jsonl"
    # More than an epoch of the longest run: the order of an epoch does not depend on how much of it
    # is read.
    texts = [f"Document {i}: " + f"words {i * i} and lines; " * (i % 7 + 1) for i in range(400)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_settings = PrepareSettings(vocab_size=300, workers=1)
    prepare([str(source)], folder / "prepared", prepare_settings, Console(quiet=True))
    return folder / "prepared"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, object, object]:
    """Print one row per cell after everything else that pytest prints."""
    result = yield
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        rows = [
            (dict(report.user_properties), word)
            for outcome, word in (("passed", "pass"), ("failed", "FAIL"))
            for report in terminal.stats.get(outcome, [])
            if report.when == "call" and "cell" in dict(report.user_properties)
        ]
        for line in _table(rows):
            terminal.write_line(line)
    return result


def _table(rows: list[tuple[dict[str, object], str]]) -> list[str]:
    """One line per cell, by ranks, and one that sums up."""
    if not rows:
        return []
    width = max(len(str(row["cell"])) for row, _ in rows)
    lines = ["", f"{'layout':{width}}  ranks  loss error  gradient error  result"]
    for row, outcome in sorted(rows, key=lambda entry: (int(str(entry[0]["ranks"])), str(entry))):
        lines.append(
            f"{row['cell']:{width}}  {row['ranks']:5}  {_number(row, 'loss'):>10}  "
            f"{_number(row, 'gradient'):>14}  {outcome}"
        )
    passed = sum(outcome == "pass" for _, outcome in rows)
    total = f"{passed} of {len(rows)} layouts equal one process"
    ranks = max(int(str(row["ranks"])) for row, _ in rows)
    lines.append(
        f"{total:{width}}  {ranks:5}  {_largest(rows, 'loss'):>10}  "
        f"{_largest(rows, 'gradient'):>14}  {'pass' if passed == len(rows) else 'FAIL'}"
    )
    return lines


def _number(row: dict[str, object], name: str) -> str:
    """A difference, or a dash where the run did not get that far."""
    return f"{row[name]:.1e}" if name in row else "-"


def _largest(rows: list[tuple[dict[str, object], str]], name: str) -> str:
    return f"{max((float(str(row[name])) for row, _ in rows if name in row), default=0.0):.1e}"
