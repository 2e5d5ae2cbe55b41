"""Telemetry on the page."""

import pytest

from moepp_megatron.tools.report.blocks import _render_page
from moepp_megatron.tools.report.curves import section_plots
from moepp_megatron.tools.report.page import _hardware_cards, _page
from moepp_megatron.tools.report.run_data import load_run

# Of 2,048 tokens a step.
OF_GPUS = {
    "mfu": 0.4,
    "energy_j": 3.6e6,
    "energy_per_token_j": 3.6e6 / 2048,
    "gpu_hours": 0.25,
    "gpu_power_w": 600.0,
}


@pytest.fixture
def load(make_run):
    """Reads a run of four steps whose records have these numbers."""
    return lambda **changes: load_run(make_run(steps=4, **changes))


def test_totals_of_the_run(load):
    cards = {card.label: card for card in _hardware_cards(load(each=OF_GPUS))}
    assert cards["MFU"].value == "40.0%"
    assert cards["GPU-hours"].value == "1.00"
    assert cards["Energy"].value == "4.000 kWh"
    assert "1,757.8125 J per token" in cards["Energy"].note


def test_plots_are_those_that_the_records_have(load):
    run = load(each=OF_GPUS)
    assert [plot.title for plot in section_plots(run, "hardware")] == [
        "Model FLOPs utilisation",
        "Energy per token",
        "Power of a GPU",
    ]
    page = _render_page(_page(run))
    assert ">Hardware</h2>" in page


@pytest.mark.parametrize("missing", ["energy_j", "mfu"])
def test_records_without_some_of_it(load, missing):
    def edit(records):
        for record in records[:2]:
            del record[missing]

    labels = [card.label for card in _hardware_cards(load(each=OF_GPUS, edit=edit))]
    assert labels == ["MFU", "GPU-hours", "Energy"]


def test_small_rates_are_shown_in_a_unit_of_their_size(load):
    """A CPU's 0.03 TFLOP/s are 30 GFLOP/s, NVLink's 1e11 bytes/s are 100 Gbytes/s."""
    run = load(each={"model_tflops": 0.03, "nvlink_bytes_per_s": 1e11})
    nvlink, flops = section_plots(run, "hardware")
    assert flops.title == "Model FLOP/s"
    assert "Model FLOP/s: 30.0 GFLOP/s at step 4" in flops.alt
    assert "NVLink traffic: 100.0 Gbytes/s at step 4" in nvlink.alt
