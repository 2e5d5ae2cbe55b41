"""The run's use of machines: energy, GPU-hours, MFU, from the telemetry in the records."""

import numpy as np

from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Card, Plot
from moepp_megatron.tools.report.curves import drawn_metrics, plain_plot
from moepp_megatron.tools.report.run_data import RunData


def hardware_plots(run: RunData) -> list[Plot]:
    """Plots of the telemetry in the records; none for a run without telemetry."""
    plots = []
    for key, drawn in drawn_metrics(run, "hardware"):
        scale, axis = _unit(key, drawn.axis, run)
        plots.append(plain_plot(run, key, drawn, axis, scale))
    return plots


def _unit(key: str, axis: str, run: RunData) -> tuple[float, str]:
    """Return the factor of the values and their unit with it: rates get a prefix."""
    if not axis.endswith("/s"):
        return 1.0, axis
    base = 1e12 if key == "model_tflops" else 1.0
    divisor, name = formatting.rate(base * float(np.nanmax(run.numbers.values(key))), axis)
    return base / divisor, name


def hardware_cards(run: RunData) -> list[Card]:
    """Totals of the run and medians of its records, as far as they have telemetry."""
    cards = []
    mfu, hours, energy = (run.numbers.series(key).y for key in ("mfu", "gpu_hours", "energy_j"))
    if len(mfu):
        cards.append(
            Card("MFU", formatting.percent(float(np.median(mfu))), "median of the records")
        )
    if len(hours):
        note = "evaluation and saving included"
        cards.append(Card("GPU-hours", formatting.number(sum(map(float, hours)), 2), note))
    if len(energy):
        joules = sum(map(float, energy))
        each, per_token = run.numbers.values("energy_j"), run.numbers.values("energy_per_token_j")
        known = np.isfinite(each) & (per_token > 0)
        tokens = sum(map(float, each[known] / per_token[known]))
        note = "only GPUs"
        if tokens > 0:
            note += f"; {formatting.number(joules / tokens)} J per token"
        cards.append(Card("Energy", f"{formatting.number(joules / 3.6e6, 3)} kWh", note))
    return cards
