"""The catalogue of metrics, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.metrics_page import TABLES, with_ranges, with_tables
from moepp_megatron.catalogue import IN_LAYERS, METRICS, OF_RECORD
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.tensorboard import tag_of
from moepp_megatron.workbench.report.healthy import guard_rule

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", sorted({page for page, _ in TABLES}))
def test_tables_in_the_docs_are_up_to_date(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert with_tables(page, text) == text, "write them anew: python -m benchmarks.metrics_page"
    stale = text.replace("| `loss` |", "| `lost` |")
    assert stale != text
    assert with_tables(page, stale) == text


def test_healthy_ranges_in_the_docs_are_the_catalogues() -> None:
    text = (DOCS / "routing.md").read_text(encoding="utf-8")
    assert with_ranges(text) == text, "write them anew: python -m benchmarks.metrics_page"
    for name, row in METRICS.items():
        if row.healthy:
            assert f"\n| `{name}`" in text, f"docs/routing.md has no row for {name}"
            assert with_ranges(text.replace(f"| {row.healthy} |", "| 1 to 2 |")) == text, name


def test_every_key_of_a_record_has_a_row() -> None:
    assert list(OF_RECORD) == list(StepMetrics.model_fields)
    assert not OF_RECORD.keys() & IN_LAYERS.keys()


def test_no_two_metrics_share_a_name_or_a_plot() -> None:
    tags = [tag_of(key) for key, row in OF_RECORD.items() if not row.labels and key != "step"]
    assert len(set(tags)) == len(tags)
    for of in (
        [row.prometheus for row in METRICS.values() if row.prometheus],
        [row.drawn.title for row in METRICS.values() if row.drawn],
        [row.panel[0] for row in METRICS.values() if row.panel],
    ):
        assert len(set(of)) == len(of)


def test_rows_are_sentences_without_an_end() -> None:
    for name, row in METRICS.items():
        assert row.meaning, name
        assert not row.meaning.endswith("."), name
        assert "|" not in row.meaning, name
        # What is wrong is said in words, or is a rule that exists.
        assert " " in row.wrong or not row.wrong or guard_rule(row.wrong), name
