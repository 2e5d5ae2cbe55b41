"""Several runs on one page."""

import html
import json

import numpy as np
import pytest
from typer.testing import CliRunner

import moepp_megatron
from moepp_megatron.cli.main import app
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.load import parse_config
from moepp_megatron.tools.report.comparison import (
    _common_end,
    _differing_settings,
    _load_runs,
    _loss_at,
)
from moepp_megatron.tools.report.page import build_report
from moepp_megatron.tools.report.run_data import ReportError
from tests.unit.tools.report.conftest import synthetic_config, synthetic_records, write_run
from tests.unit.tools.report.test_report_page import VANILLA, read_page

# What this version wants of a configuration besides.
WHOLE = {"data": {"path": "corpus"}}


def made(folder, steps, **sections):
    config = synthetic_config(**(WHOLE | sections))
    return write_run(folder, config, synthetic_records(config, steps))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run, a shorter one with another tau, a vanilla one of the first one's name."""
    base = tmp_path_factory.mktemp("runs")
    done = {"train_iters": 60}
    return [
        made(base / "a", 60, training=done),
        made(base / "b", 30, moe={"tau": 0.1}),
        made(base / "other/a", 60, training=done, moe=VANILLA),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new/c.html"
    assert moepp_megatron.report(*runs, out=out) == out
    return read_page(out)


def test_every_run_is_named_and_its_numbers_are_shown(page):
    assert "a, b, other/a" in page.text
    assert "3 runs;" in page.text
    assert "Not all planned steps are done: b (30 of 300)" in page.text
    assert "b 30 of 300 61,440 " in page.text
    assert "after 61,440 tokens" in page.text


def test_settings_that_differ_are_a_table(runs, page):
    found = _differing_settings(_load_runs(runs))
    assert found["moe.tau"] == ["0.75", "0.1", "0.75"]
    assert found["moe.num_zero_experts"] == ["1", "1", "0"]
    assert found["training.train_iters"] == ["60", "300", "60"]
    assert not any(name.startswith(("model.", "run.")) for name in found)
    assert "moe.tau 0.75 0.1 0.75" in page.text
    assert f"{len(found)} settings differ" in page.text


def test_plots_lay_all_runs_over_each_other(page):
    titles = [alt.split(":")[0] for _, alt in page.pictures]
    assert titles == ["Loss over tokens", "FFN share of all selections"]
    for _, alt in page.pictures:
        assert "a: " in alt
        assert "; b: " in alt
        assert "; other/a: " in alt


def test_flops_are_those_of_the_mfu(runs):
    run = _load_runs(runs)[1]
    config = parse_config(synthetic_config(**WHOLE, moe={"tau": 0.1}))
    each = [
        training_flops_per_token(config, record.ffn_fraction) * 16 * 128
        for record in run.data.records
    ]
    np.testing.assert_allclose(run.axes["flops"], np.cumsum(each), rtol=1e-12)
    times = np.cumsum([record.step_time_s for record in run.data.records])
    np.testing.assert_allclose(run.axes["seconds"], times, rtol=1e-12)


def test_losses_are_taken_where_all_have_come(runs):
    first, second, _ = _load_runs(runs)
    end = _common_end([first, second], "tokens")
    assert end == 30 * 16 * 128
    # Beyond 90% of 30 steps: steps 28, 29 and 30 of both.
    for run in (first, second):
        expected = np.mean([record.loss for record in run.data.records[27:30]])
        assert _loss_at(run, "tokens", end) == pytest.approx(expected, rel=1e-12)
    # One record that reaches farther than the end counts for nothing.
    assert np.isnan(_loss_at(first, "tokens", 1.0))


def test_a_run_that_is_named_twice_is_one(runs, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(runs[0])
    assert len(_load_runs([runs[0], runs[1], link, runs[0] / "."])) == 2
    with pytest.raises(ReportError, match=r"RUN \(1 different folders\) must be 2 to 24"):
        build_report(runs[0], link)


def test_a_run_inside_another_of_its_name(tmp_path):
    outer = made(tmp_path / "a", 3)
    names = [run.name for run in _load_runs([outer, made(outer / "a", 3)])]
    assert len(set(names)) == 2


def test_what_a_run_lacks_is_said(runs, tmp_path):
    """Of another version, with one record, with numbers that are not finite."""
    config = synthetic_config(**WHOLE, moe={"of_another_version": 1})
    records = synthetic_records(config, 20)
    for record in records:
        record["loss"] = record["step_time_s"] = None
        record.pop("valid_loss", None)
    old = write_run(tmp_path / "old", config, records)
    begun = made(tmp_path / "begun", 1)
    out = build_report(runs[0], old, begun, out=tmp_path / "c.html")
    text = read_page(out).text
    assert text.count("Fewer than two points: ") == 2
    assert "not finite" in text
    assert "moe.of_another_version - 1 -" in text
    only = read_page(build_report(old, begun, out=out)).text
    assert "No two records of this run have a finite loss over tokens." in only


def test_losses_of_other_data_are_not_compared_silently(runs, tmp_path):
    other = made(tmp_path / "o", 5, data={"path": "elsewhere"}, model={"vocab_size": 64})
    text = read_page(build_report(runs[0], other, out=tmp_path / "c.html")).text
    assert "Losses may not be comparable: model.vocab_size, data.path differ." in text


def test_names_and_values_are_escaped(tmp_path):
    hostile = "_<script>$\\frac$ & caf\u00e9\x1b[2J"
    runs = [made(tmp_path / hostile, 3), made(tmp_path / "b", 3, run={"name": "</td><img src=x>"})]
    path = build_report(*runs, out=tmp_path / "c.html")
    source = path.read_text(encoding="ascii")
    assert "<script" not in source
    assert "<img src=x" not in source
    assert "\x1b" not in source
    assert "</td><img src=x>" in html.unescape(source)
    assert all(
        value.startswith(("#", "data:image/svg+xml"))
        for _, key, value in read_page(path).attributes
        if key in ("src", "href")
    )


def test_a_long_value_is_cut_and_still_differs(tmp_path):
    long = "x" * 500
    runs = [made(tmp_path / end, 2, data={"path": long + end}) for end in ("a", "b")]
    values = _differing_settings(_load_runs(runs))["data.path"]
    assert all(value.endswith("... (501 characters)") for value in values)


def test_the_command(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["report", *map(str, runs)]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stdout) == (0, "comparison.html\n")
    first = (tmp_path / "comparison.html").read_bytes()
    # A run continues: a further record, and a line that is half written.
    with (runs[1] / "metrics.jsonl").open("a") as file:
        record = synthetic_records(synthetic_config(), 31)[-1]
        file.write(json.dumps(record) + '\n{"step": 32, "tok')
    result = CliRunner().invoke(app, [*words, "--out", "more/again.html"])
    assert (result.exit_code, result.stdout) == (0, "more/again.html\n")
    again = (tmp_path / "more/again.html").read_bytes()
    assert again != first
    assert b"31 of 300" in again
    alone = CliRunner().invoke(app, ["report", str(runs[0]), "--out", "alone.html"])
    assert alone.exit_code == 0
    assert (tmp_path / "alone.html").stat().st_size > 10_000
    assert not (runs[0] / "report.html").exists()
