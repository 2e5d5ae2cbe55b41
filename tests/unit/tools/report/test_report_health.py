"""Router health and alerts on the page."""

import math

import pytest

from moepp_megatron.tools.report.alerts import MAX_ROWS, alert_blocks
from moepp_megatron.tools.report.curves import _loss_plot
from moepp_megatron.tools.report.drawing import plot_style
from moepp_megatron.tools.report.expert_plots import expert_plots
from moepp_megatron.tools.report.page import build_report
from moepp_megatron.tools.report.router_health_plots import health_plots, histogram_table
from moepp_megatron.tools.report.run_data import ReportError, load_run
from tests.parallel.training_runs import VANILLA
from tests.unit.tools.report.conftest import add_health, alert, svg_of

TITLES = {
    "Entropy of the gates",
    "Selection margin",
    "Variance of the router logits",
    "Gating residual",
    "Likeness of the router's rows",
    "Balance loss against language model",
    "Idlest FFN expert",
    "Constant experts: share of the input replaced",
    "Constant experts: norm",
    "Loss by FFN experts of a token",
}


def plots_of(run):
    with plot_style():
        return {plot.title: plot for plot in health_plots(load_run(run))}


def with_alerts(run, *alerts):
    (run / "alerts.jsonl").write_text("".join(each.to_json_line() for each in alerts))
    return run


def test_every_measured_number_has_its_plot(make_run):
    plots = plots_of(make_run(edit=add_health))
    assert plots.keys() == TITLES
    assert all(plot.image is not None for plot in plots.values())


def test_numbers_in_words_are_those_of_the_last_measured_step(make_run):
    def edit(records):
        add_health(records)
        health = records[-1]["router_health"]
        health["selection_margin"] = [0.1, 0.2, 0.3, 0.4]
        health["residual_ratio"] = [0.0, 0.5, 0.6, 0.7]
        health["gate_entropy"] = [math.log(12) / 2] * 4
        records[-1]["layer_expert_share"] = [
            [0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1],
            *[[1 / 12] * 12] * 3,
        ]

    plots = plots_of(make_run(edit=edit))
    margin = plots["Selection margin"].alt
    assert margin == "Selection margin: mean: 0.25 at step 60, layers from 0.1 to 0.4."
    # The first layer has no residual, which is not a residual of 0.
    assert "mean: 0.6 at step 60, layers from 0.5 to 0.7" in plots["Gating residual"].alt
    assert "mean: 50.0% at step 60" in plots["Entropy of the gates"].alt
    assert "mean: 0.75 at step 60, layers from 0 to 1" in plots["Idlest FFN expert"].alt


def test_tokens_by_their_ffn_experts_are_a_table(make_run):
    def edit(records):
        add_health(records)
        records[-1]["layer_ffn_histogram"] = [[0.125, 0.5, 0.375], [0, 0, 1]] * 2

    table = histogram_table(load_run(make_run(edit=edit)))
    assert table.head == ("MoE layer", "0 FFN", "1 FFN", "2 FFN")
    assert [" ".join(cell.text for cell in row) for row in table.rows] == [
        "1 12.5% 50.0% 37.5%",
        "2 0.0% 0.0% 100.0%",
        "3 12.5% 50.0% 37.5%",
        "4 0.0% 0.0% 100.0%",
    ]


def test_what_was_not_measured_has_no_plot(make_run):
    assert plots_of(make_run()).keys() == {"Idlest FFN expert"}


def test_single_layer_and_missing_values_draw(make_run):
    def edit(records):
        add_health(records)
        for record in records:
            if "router_health" in record:
                record["router_health"]["constant_replaced"] = [None]
                record["loss_by_ffn"][2] = None

    plots = plots_of(make_run(edit=edit, model={"num_layers": 1}))
    assert plots.keys() == TITLES - {
        "Gating residual",
        "Constant experts: share of the input replaced",
    }
    assert "2 FFN experts" not in plots["Loss by FFN experts of a token"].alt


def test_lists_of_unequal_lengths_are_left_out(make_run):
    def edit(records):
        add_health(records)
        records[-1]["layer_ffn_histogram"] = [[1.0], [0.5, 0.5]]
        records[-1]["layer_expert_share"] = [[], [1 / 12] * 12]

    run = load_run(make_run(edit=edit))
    with plot_style():
        assert {plot.title for plot in health_plots(run)} == TITLES
        heat_map = expert_plots(run)[0]
    assert histogram_table(run) is None
    assert heat_map.image is not None


def test_a_vanilla_run_has_no_health(make_run):
    assert plots_of(make_run(moe=VANILLA)) == {}


def test_alerts_stand_in_the_table_with_their_moments(make_run):
    run = with_alerts(
        make_run(),
        alert(12),
        alert(20, rule="few_ffn_experts", layer=None, action="warn", severity="critical"),
        alert(40, severity="info", value=math.nan),
    )
    text, table = alert_blocks(load_run(run))
    assert text.lines == ["3 alerts in alerts.jsonl: dead_expert (2), few_ffn_experts (1)."]
    rows = [[cell.text for cell in row] for row in table.rows]
    assert [row[1] for row in rows] == ["12", "20", "40"]
    assert rows[0][3] == "min_ffn_load of layer 3: 0.00412"
    assert rows[1][3] == "min_ffn_load: 0.00412"
    assert rows[1][5] == "warn"
    assert rows[2][3].endswith("not finite")
    page = build_report(run).read_text(encoding="ascii")
    assert "&lt; 0.01 for 100 steps" in page
    assert "raised no alert" not in page


def test_a_guard_that_was_off_is_said(make_run):
    said = "The routing guard was off."
    assert said not in build_report(make_run()).read_text(encoding="ascii")
    off = build_report(make_run(routing_guard={"enabled": False}))
    assert said in off.read_text(encoding="ascii")


def test_many_alerts_are_counted_and_the_newest_shown(make_run):
    run = with_alerts(make_run(), *(alert(step) for step in range(1, MAX_ROWS + 31)))
    text, table = alert_blocks(load_run(run))
    assert len(table.rows) == MAX_ROWS
    assert table.rows[-1][1].text == str(MAX_ROWS + 30)
    assert f"{MAX_ROWS + 30} alerts" in text.lines[0]


def test_marks_of_alerts_that_call_for_attention_are_on_the_loss(make_run):
    run = make_run()

    def picture(*alerts):
        with plot_style():
            return svg_of(_loss_plot(load_run(with_alerts(run, *alerts))).image)

    plain, normal, outside, marked = (
        picture(),
        picture(alert(20, severity="info")),
        picture(alert(900)),
        picture(alert(20), alert(30)),
    )
    assert plain == normal == outside
    # Two lines and one entry of the legend.
    assert marked.count("#e69f00") - plain.count("#e69f00") == 3


def test_alerts_that_cannot_be_read_are_an_error(make_run):
    run = make_run()
    (run / "alerts.jsonl").mkdir()
    with pytest.raises(ReportError, match=r"alerts.jsonl: cannot be read .*; make it readable"):
        build_report(run)
