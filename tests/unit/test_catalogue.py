"""The catalogue of metrics, and what is made of it."""

from __future__ import annotations

from moepp_megatron.catalogue import IN_LAYERS, METRICS, OF_RECORD
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.tensorboard import tag_of
from moepp_megatron.workbench.report.healthy import guard_rule


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
