"""The run's use of machines: energy, GPU-hours, MFU, from the telemetry in the records."""

from statistics import median

from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.curves import drawn_metrics, plain_plot
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.run_data import RunData


def hardware_plots(run: RunData) -> list[Plot]:
    """Plots of the telemetry in the records; none for a run without telemetry."""
    plots = []
    for key, drawn in drawn_metrics(run, "hardware"):
        scale, axis = _unit(key, drawn.axis, run)
        plots.append(plain_plot(run, key, drawn, axis, scale))
    return plots


def _unit(key: str, axis: str, run: RunData) -> tuple[float, str]:
    """What to multiply the values by, and the unit that they then have: rates get a prefix."""
    if not axis.endswith("/s"):
        return 1.0, axis
    base = 1e12 if key == "model_tflops" else 1.0
    largest = max(v for record in run.records if (v := getattr(record, key)) is not None)
    divisor, name = formatting.rate(base * largest, axis)
    return base / divisor, name


def hardware_cards(run: RunData) -> list[Card]:
    """Totals of the run and medians of its records, as far as they have telemetry."""
    records, cards = run.records, []
    mfu = [record.mfu for record in records if record.mfu is not None]
    if mfu:
        cards.append(Card("MFU", formatting.percent(median(mfu)), "median of the records"))
    hours = [record.gpu_hours for record in records if record.gpu_hours is not None]
    if hours:
        note = "evaluation and saving included"
        cards.append(Card("GPU-hours", formatting.number(sum(hours), 2), note))
    energy = [record.energy_j for record in records if record.energy_j is not None]
    if energy:
        kwh = sum(energy) / 3.6e6
        tokens = sum(
            record.energy_j / record.energy_per_token_j
            for record in records
            if record.energy_j is not None and record.energy_per_token_j
        )
        note = "only GPUs"
        if tokens > 0:
            note += f"; {formatting.number(sum(energy) / tokens)} J per token"
        cards.append(Card("Energy", f"{formatting.number(kwh, 3)} kWh", note))
    return cards
