"""Numbers by data source and class of tokens: on the page, live, and at Prometheus."""

import io
import time

import pytest

from moepp_megatron.runtime.terminal import Console
from moepp_megatron.tools.report.blocks import _render_page
from moepp_megatron.tools.report.drawing import plot_style
from moepp_megatron.tools.report.live.prometheus import _samples_of
from moepp_megatron.tools.report.live.run import LiveRun
from moepp_megatron.tools.report.live.table import print_run
from moepp_megatron.tools.report.page import _page
from moepp_megatron.tools.report.run_data import load_run
from moepp_megatron.tools.report.token_groups import source_table, token_plots

SHARES = {"web <b>": 0.6, "code": 0.3, "chat": 0.1}


def add_names(records):
    """Three sources, the last of which no record has at the end; two classes."""
    for record in records:
        names = list(SHARES) if record["step"] < 15 else list(SHARES)[:2]
        even = [1 / 12] * 12
        record |= {
            "source_tokens": {name: SHARES[name] for name in names},
            "source_loss": {name: 5.0 - SHARES[name] - record["step"] / 100 for name in names},
            "source_ffn_share": {name: SHARES[name] for name in names},
            "source_expert_share": {name: even[:-1] + [0.5] for name in names},
            "class_ffn_per_token": {"rarest 1%": 1.5, "keyword": 1.2},
        }


@pytest.fixture
def run(make_run):
    folder = make_run(steps=20, edit=add_names)
    return folder


def test_table_and_plots_of_the_page(run):
    data = load_run(run)
    table = source_table(data)
    rows = {name.text: [cell.text for cell in row] for name, *row in table.rows}
    assert list(rows) == list(SHARES)
    web = rows["web <b>"]
    # Records 19 and 20.
    assert web == ["60.0%", "4.2050", "60.0%"]
    assert rows["chat"][1] == "-"
    with plot_style():
        plots = {plot.title: plot for plot in token_plots(data)}
    assert list(plots) == [
        "Loss by data source",
        "FFN share by data source",
        "FFN experts by frequency of the token",
        "FFN experts by kind of token",
    ]
    assert ": 4.7600 at step 14" in plots["Loss by data source"].alt
    page = _render_page(_page(data))
    assert "Data sources and kinds of tokens" in page
    assert "web &lt;b&gt;" in page
    assert "web <b>" not in page


def test_a_run_of_one_source_has_no_table(make_run):
    data = load_run(make_run(steps=5))
    assert source_table(data) is None
    assert token_plots(data) == []


def test_names_without_a_finite_number_have_no_plot(make_run):
    def edit(records):
        records[-1] |= {"task_score": {"arc/acc": None}, "class_ffn_per_token": {"keyword": 1.0}}

    data = load_run(make_run(steps=5, edit=edit))
    assert token_plots(data) == []


def test_the_monitor_has_numbers_by_source(run):
    live = LiveRun(run, clock=time.time)
    out = io.StringIO()
    print_run(live, Console(file=out, width=200, color_system=None))
    lines = [line.split(None, 1) for line in out.getvalue().splitlines()]
    shown = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    assert shown["source_loss"] == "web <b> 4.2  code 4.5"
    assert shown["source_ffn_share"] == "web <b> 60.0%  code 30.0%"


def test_prometheus_gets_them_by_name(run):
    live = LiveRun(run, clock=time.time)
    live.poll()
    found = {metric.name: dict(samples) for metric, samples in _samples_of(live)}
    assert found["moepp_source_loss"][("code",)] == pytest.approx(4.5)
    assert found["moepp_source_tokens_ratio"] == {("web <b>",): 0.6, ("code",): 0.3}
    assert found["moepp_class_ffn_per_token"][("rarest 1%",)] == 1.5
    experts = found["moepp_source_expert_ratio"]
    assert len(experts) == 24
    assert sum(share == 0.5 for share in experts.values()) == 2
    assert all(len(labels) == 3 for labels in experts)
