"""The run's use of machines: energy, GPU-hours, MFU, from the telemetry in the records."""

from collections.abc import Sequence
from statistics import median

from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.curves import plain_plot
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.run_data import RunData

_MFU = "Model FLOP/s over the rated dense FLOP/s of all cards; skipped experts do not count."
_FLOPS = "Model FLOP/s of a rank; skipped experts do not count."
_ENERGY = "Energy of all cards since the record before, evaluation and saving included, a token."
_POWER = "Power of a card, mean over cards and time since the record before."
_BUSY = "Share of the time in which a kernel ran, mean over cards."
_NVLINK = "NVLink traffic of a card, sent and received."
_CPU = "Share of all cores of a node in use, other processes included."

# Key of the record, title, axis, caption, whether it is a share. Rates get a prefix by their size.
_PLOTS = (
    ("mfu", "Model FLOPs utilisation", "MFU", _MFU, True),
    ("energy_per_token_j", "Energy a token", "J", _ENERGY, False),
    ("gpu_power_w", "Power of a card", "W", _POWER, False),
    ("gpu_utilization", "Utilisation of a card", "share", _BUSY, True),
    ("nvlink_bytes_per_s", "NVLink traffic", "bytes/s", _NVLINK, False),
    ("model_tflops", "Model FLOP/s", "FLOP/s", _FLOPS, False),
    ("cpu_utilization", "CPU utilisation", "share", _CPU, True),
)


def hardware_plots(run: RunData) -> list[Plot]:
    """Plots of the telemetry in the records; none for a run without telemetry."""
    plots = []
    for key, title, axis, caption, share in _PLOTS:
        known = [v for record in run.records if (v := getattr(record, key)) is not None]
        if known:
            scale, axis = _unit(key, axis, known)
            plots.append(plain_plot(run, title, key, axis, caption, share=share, scale=scale))
    return plots


def _unit(key: str, axis: str, values: Sequence[float]) -> tuple[float, str]:
    """The factor for the values, and the resulting unit."""
    if not axis.endswith("/s"):
        return 1.0, axis
    base = 1e12 if key == "model_tflops" else 1.0
    divisor, name = formatting.rate(base * max(values), axis)
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
        note = "cards alone"
        if tokens > 0:
            note += f"; {formatting.number(sum(energy) / tokens)} J a token"
        cards.append(Card("Energy", f"{formatting.number(kwh, 3)} kWh", note))
    return cards
