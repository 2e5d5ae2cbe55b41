"""The headline numbers of a run: losses, savings, speed, and what it cost its machines."""

import numpy as np

from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Card
from moepp_megatron.tools.report.run_data import RunData
from moepp_megatron.tools.report.savings import Savings
from moepp_megatron.tools.report.summary import RunSummary


def headline_cards(run: RunData, summary: RunSummary, savings: Savings) -> list[Card]:
    """The headline numbers in the order of the page."""
    return [*_loss_cards(summary), *_saving_cards(run, summary, savings), *_speed_cards(summary)]


def _loss_cards(summary: RunSummary) -> list[Card]:
    note = f"nats, step {summary.last_step:,}"
    if summary.tail_count > 1:
        note += f"; mean of {summary.window}: {formatting.number(summary.tail_loss)}"
    cards = [Card("Final loss", formatting.number(summary.loss), note)]
    if summary.valid_loss is None:
        cards.append(Card("Validation loss", "none", "this run was not evaluated"))
        note = "exp of the mean training loss at the end"
    else:
        cards.append(
            Card(
                "Validation loss",
                formatting.number(summary.valid_loss),
                f"nats, step {summary.valid_step:,}",
            )
        )
        note = "exp of the validation loss"
    return [*cards, Card("Perplexity", formatting.number(summary.perplexity, 2), note)]


def _saving_cards(run: RunData, summary: RunSummary, savings: Savings) -> list[Card]:
    if run.config.experts.num_zero_computation_experts == 0:
        return [Card("FFN share", formatting.percent(summary.ffn_fraction), "vanilla: no others")]
    share, saved = formatting.shares([savings.ffn_fraction, savings.expert_work_saved])
    note = f"{summary.window}; phi is {formatting.percent(summary.phi)}"
    cards = [
        Card("FFN share", share, note, accent=True),
        Card("Expert work saved", saved, f"1 - FFN share, {summary.window}", accent=True),
    ]
    if not summary.a2a_bytes:
        cards.append(Card("All-to-all saved", "none", "no hidden vector left its rank"))
    elif savings.vanilla_a2a_bytes is not None:
        less = formatting.data_size(savings.vanilla_a2a_bytes - savings.a2a_bytes)
        whole = formatting.data_size(savings.vanilla_a2a_bytes)
        note = f"in the whole run, of {whole} of a vanilla layer"
        cards.append(Card("All-to-all saved", less, note, accent=True))
    return cards


def _speed_cards(summary: RunSummary) -> list[Card]:
    return [
        Card("Tokens/s", formatting.big_count(summary.tokens_per_s), "median of the records"),
        Card("Tokens", formatting.big_count(summary.tokens), f"trained on: {summary.tokens:,}"),
        Card(
            "Training time",
            formatting.duration(summary.train_seconds),
            "in steps, without start and evaluation",
        ),
    ]


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
