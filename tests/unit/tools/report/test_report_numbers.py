"""Numbers of the report against hand calculations."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moepp_megatron.cli.run_end import print_end
from moepp_megatron.config import load_config
from moepp_megatron.tools.report import formatting, run_data
from moepp_megatron.tools.report.blocks import _render_page
from moepp_megatron.tools.report.drawing import MAX_POINTS, envelope, smooth, thin
from moepp_megatron.tools.report.page import _page
from moepp_megatron.tools.report.run_data import ReportError, load_run
from moepp_megatron.tools.report.savings import (
    compute_savings,
    savings_table,
    vanilla_a2a_bytes,
)
from moepp_megatron.tools.report.summary import finite_mean, step_weights, summarize
from moepp_megatron.training.run import TrainResult
from tests.unit.tools.report.conftest import records_of


def test_summary_of_a_run(make_run):
    run = make_run(steps=60)
    records = records_of(run)
    summary = summarize(load_run(run))
    assert summary.phi == pytest.approx(0.75 * 8 / (0.75 * 8 + 4))
    assert summary.loss == records[-1]["loss"]
    assert summary.tail_loss == pytest.approx(np.mean([r["loss"] for r in records[-6:]]))
    assert (summary.valid_loss, summary.valid_step) == (records[-1]["valid_loss"], 60)
    assert summary.perplexity == pytest.approx(math.exp(records[-1]["valid_loss"]))
    assert summary.ffn_fraction == pytest.approx(np.mean([r["ffn_fraction"] for r in records]))
    assert summary.train_seconds == pytest.approx(sum(r["step_time_s"] for r in records))
    assert summary.a2a_bytes == pytest.approx(sum(r["a2a_bytes"] for r in records))
    assert summary.tokens == 60 * 16 * 128


def test_records_stand_for_the_steps_since_the_one_before(make_run):
    def every_tenth(records):
        records[:] = records[9::10]

    run = load_run(make_run(steps=30, edit=every_tenth, each={"a2a_bytes": 100}))
    assert step_weights(run.records.steps).tolist() == [10, 10, 10]
    assert summarize(run).a2a_bytes == pytest.approx(3000)


def test_savings_against_the_vanilla_layer(make_run):
    run = load_run(make_run(steps=10, each={"ffn_fraction": 0.6, "a2a_bytes": 600}))
    savings = compute_savings(run.config, summarize(run))
    assert savings.vanilla_a2a_bytes == pytest.approx(10000)
    # 4 layers, D 128, H 256, F 8, E 12, 2 constant experts, K 2.
    assert savings.vanilla.ffn == 4 * 2 * 6 * 128 * 256
    assert savings.measured.ffn == pytest.approx(0.6 * savings.vanilla.ffn)
    assert savings.vanilla.total - savings.vanilla.ffn == 4 * 2 * 128 * 8
    router, others = 4 * 2 * 128 * 12 + 3 * 2 * 12 * 12, 4 * (2 * 128 + 6 * 2 * 128)
    assert savings.measured.total - savings.measured.ffn == pytest.approx(router + others)


def _falling(records):
    """FFN shares from 0.9 to 0.5, bytes to match; steps 46 to 50 are the last tenth of 50."""
    for record in records:
        record["ffn_fraction"] = 0.9 if record["step"] <= 45 else 0.5
        record["a2a_bytes"] = round(1000 * record["ffn_fraction"])


def test_every_share_and_saving_is_of_the_last_tenth_of_the_records(make_run):
    """0.5 there, 0.86 over the whole run: nothing on the page may say 14% or 86%."""
    run = load_run(make_run(steps=50, edit=_falling))
    summary = summarize(run)
    savings = compute_savings(run.config, summary)
    assert summary.window == "steps 46 to 50"
    assert summary.tail_ffn_fraction == pytest.approx(0.5)
    assert savings.measured.ffn == pytest.approx(0.5 * savings.vanilla.ffn)
    # Totals of the run are totals.
    assert summary.a2a_bytes == pytest.approx(45 * 900 + 5 * 500)
    table = savings_table(run, summary, savings)
    shares = {row[0].text: row[3].text for row in table.rows if row[3].text.endswith("%")}
    assert shares["FFN experts a token takes"] == "50.0%"
    assert shares["FFN expert work"] == "50.0%"
    page = re.sub(r"<[^>]+>", " ", _render_page(_page(run)))
    assert "86.0%" not in page
    assert "14.0%" not in page
    assert page.count("steps 46 to 50") >= 4


def _say_end(config, record):
    request = SimpleNamespace(config=config, rank=SimpleNamespace(rank=0), starts_ranks=False)
    print_end(request, TrainResult(Path(config.run.dir), metrics=record), False)


def test_a_run_that_was_complete_already_gets_its_page(make_run, capsys):
    """It may have been killed between its last checkpoint and its page."""
    folder = make_run(steps=3)
    _say_end(SimpleNamespace(run=SimpleNamespace(dir=str(folder))), None)
    assert "nothing left to do" in capsys.readouterr().out
    assert (folder / "report.html").exists()


def test_a_run_ends_without_its_page_and_is_read_once(make_run, capsys, monkeypatch):
    read, load = [], run_data.load_run
    monkeypatch.setattr(run_data, "load_run", lambda folder: read.append(folder) or load(folder))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("page", "drawing"):
        monkeypatch.delitem(sys.modules, f"moepp_megatron.tools.report.{name}")
    folder = make_run(steps=50, edit=_falling)
    config = load_config(folder / "config.yaml", [f"run.dir={folder}"])
    _say_end(config, run_data.read_metrics(folder / "metrics.jsonl")[-1])
    said = capsys.readouterr().out
    assert "0.500 of all selections" in said
    assert "mean of steps 46 to 50" in said
    assert "report       none (matplotlib (plots of pages) is not installed; " in said
    assert read == [folder]


def test_more_work_is_not_called_a_negative_saving(make_run):
    run = load_run(make_run(steps=10, each={"ffn_fraction": 1.0}))
    summary = summarize(run)
    savings = compute_savings(run.config, summary)
    saved = {row[0].text: row[3].text for row in savings_table(run, summary, savings).rows}
    more = savings.measured.total / savings.vanilla.total - 1
    assert saved["All of the layer's work"] == f"{100 * more:.1f}% more"
    assert not any(text.startswith("-") for text in saved.values())


def test_means_leave_out_what_is_not_finite():
    values, weights = np.array([1.0, math.nan, 3.0]), np.array([1.0, 5.0, 3.0])
    assert finite_mean(values, weights) == pytest.approx(2.5)
    assert math.isnan(finite_mean(np.array([math.inf])))


def test_thinning_keeps_the_mean_and_the_last_step():
    values = np.arange(10 * MAX_POINTS + 3, dtype=float)
    x, y = thin(np.arange(1.0, len(values) + 1), values)
    assert len(x) <= MAX_POINTS
    assert x[-1] == len(values)
    assert y[0] == pytest.approx(values[:11].mean())
    np.testing.assert_allclose(smooth(np.full(200, 3.0)), 3.0)


def test_no_peak_is_thinned_away():
    steps = np.arange(10 * MAX_POINTS + 3, dtype=float)
    values = np.sin(steps)
    values[[7, 5000, -1]] = 40.0, -40.0, 30.0
    x, y = envelope(steps, values)
    assert len(x) <= 2 * MAX_POINTS
    assert (np.diff(x) > 0).all()
    assert {(7.0, 40.0), (5000.0, -40.0), (steps[-1], 30.0)} <= set(zip(x, y, strict=True))
    assert (values[x.astype(int)] == y).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (formatting.number(3.14159), "3.1416"),
        (formatting.number(1e-7), "1.000e-07"),
        (formatting.number(math.nan), "not finite"),
        (formatting.number(4015.882, 2), "4,015.88"),
        (formatting.percent(0.3936), "39.4%"),
        (formatting.count(1234567.4), "1,234,567"),
        (formatting.big_count(99_999_999), "99,999,999"),
        (formatting.big_count(163_840_000), "163.8 million"),
        (formatting.big_count(2.5e12), "2.50 trillion"),
        (formatting.data_size(512), "512 B"),
        (formatting.data_size(3 * 1024**2), "3.00 MiB"),
        (formatting.flops(1.5e9), "1.50 GFLOP"),
        (formatting.duration(12.34), "12.3 s"),
        (formatting.duration(125), "2 min 05 s"),
        (formatting.duration(7260), "2 h 01 min"),
    ],
)
def test_numbers_for_readers(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, r"metrics\.jsonl: cannot be read"),
        ("metrics.jsonl", b"", "has no complete record"),
        ("config.yaml", None, r"config\.yaml: cannot be read"),
        ("config.yaml", b"a: [1", "not valid YAML"),
        ("config.yaml", b"- 1", r"config\.yaml: the file: "),
        ("config.yaml", b"\xff\xfe", "not UTF-8 text"),
        ("config.yaml", b"run: {name: a}", "model: Field required"),
    ],
)
def test_incomplete_runs_are_refused_in_one_line(make_run, name, content, message):
    run = make_run(steps=2)
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(ReportError, match=message) as caught:
        load_run(run)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_another_run_is_refused(make_run):
    run = make_run(steps=2, each={"expert_share": [0.5, 0.5]})
    with pytest.raises(ReportError, match="step 1 have 2 entries but config.yaml describes 12"):
        load_run(run)


@pytest.mark.parametrize(
    ("dispatcher", "expected"),
    [("alltoall", 1000.0), ("allgather", 600.0), ("alltoall_dedup", None), ("flex", None)],
)
def test_vanilla_traffic_is_only_claimed_where_it_follows(dispatcher, expected):
    assert vanilla_a2a_bytes(dispatcher, 600.0, 0.6) == expected
