"""The page of a run: numbers, plots and configuration."""

from pathlib import Path

import numpy as np

from moepp_megatron.file_names import REPORT_PAGE
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.alerts import alert_blocks
from moepp_megatron.tools.report.blocks import (
    Block,
    Card,
    Cell,
    Page,
    PageSection,
    Table,
    Text,
    write_blocks,
)
from moepp_megatron.tools.report.comparison import DEFAULT_OUT, build_comparison
from moepp_megatron.tools.report.curves import curve_plots, section_plots
from moepp_megatron.tools.report.drawing import plot_style
from moepp_megatron.tools.report.expert_plots import expert_plots
from moepp_megatron.tools.report.router_health_plots import health_plots, histogram_table
from moepp_megatron.tools.report.run_data import RunData, load_run
from moepp_megatron.tools.report.savings import Savings, compute_savings, savings_table
from moepp_megatron.tools.report.summary import RunSummary, summarize
from moepp_megatron.tools.report.token_groups import source_table, token_plots


def build_report(folder: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, or with several runs the page that compares them, and return its path.

    One run's page is made of its configuration, metrics and alerts. A page is ASCII, needs no other
    file and makes no network requests. The same inputs give the same bytes.

    Args:
        out: The page; by default `report.html` in the run's folder, and `comparison.html` in the
            working directory for several runs.

    Raises:
        ReportError: A run is missing, incomplete or inconsistent, or the page cannot be written.
    """
    if others:
        return build_comparison([Path(folder), *map(Path, others)], Path(out or DEFAULT_OUT))
    return write_run_page(load_run(Path(folder)), out)


def write_run_page(run: RunData, out: str | Path | None = None) -> Path:
    """As `build_report`, of one run that has been read."""
    return write_blocks(Path(out or run.folder / REPORT_PAGE), _page(run))


def _page(run: RunData) -> Page:
    summary = summarize(run)
    savings = compute_savings(run.config, summary)
    with plot_style():
        sections = _sections(run, summary, savings)
    return Page(
        kind="MoE++ run report",
        title=run.config.run.name,
        lead=_sentence(run, summary),
        facts=_facts(run),
        cards=[
            *_loss_cards(summary),
            *_saving_cards(run, summary, savings),
            *_speed_cards(summary),
            *_hardware_cards(run),
        ],
        sections=sections,
        sources="config.yaml, metrics.jsonl and alerts.jsonl",
        command="moepp report RUN",
    )


def _sections(run: RunData, summary: RunSummary, savings: Savings) -> list[PageSection]:
    """All that the run has something for."""
    saved = run.config.moe.num_zero_computation_experts > 0
    health, histogram, sources = health_plots(run), histogram_table(run), source_table(run)
    terms = [[Cell(term), Cell(text, "comment")] for term, text in _terms(run, summary)]
    by_section: dict[str, list[Block]] = {
        "What MoE++ saved against a vanilla layer of the same size": [
            *([savings_table(run, summary, savings)] if saved else [])
        ],
        "Training": [*curve_plots(run)],
        "Experts": [*expert_plots(run)],
        "Data sources and kinds of tokens": [*([sources] if sources else []), *token_plots(run)],
        "Router health": [
            *([Text([_HEALTH], "note")] if health else []),
            *health,
            *([histogram] if histogram else []),
        ],
        "Alerts": alert_blocks(run),
        "Hardware": [*section_plots(run, "hardware")],
        "What the numbers mean": [Table((), terms)],
        "Configuration": [
            Text([run.config_text], "code", fold="Resolved configuration of the run (config.yaml)")
        ],
    }
    return [PageSection(title, blocks) for title, blocks in by_section.items() if blocks]


_HEALTH = (
    "Lines are means over the MoE layers, bands reach from the layer with the least to the one "
    "with the most. Green: the range of a healthy run of the quickstart model; larger models have "
    "others."
)


def _terms(run: RunData, summary: RunSummary) -> list[tuple[str, str]]:
    """Explanations for a reader who has no other page at hand."""
    phi = formatting.percent(summary.phi)
    terms = [
        (
            "Window",
            f"Shares and savings are means over the last tenth of the records, {summary.window}; "
            "totals of the run say so.",
        ),
        (
            "Balance",
            "Under perfect balance every FFN expert gets as many selections as any other. The "
            "slowest rank waits for the busiest expert.",
        ),
    ]
    if run.config.moe.num_zero_computation_experts == 0:
        return terms
    return [
        (
            "Zero-computation experts",
            "Zero returns 0, copy its input, constant a mixture of the input and a learned vector. "
            "They cost almost nothing and send nothing to other ranks.",
        ),
        (
            "FFN share",
            "Of all selections (K a token and layer), those that went to FFN experts. What lies "
            "below 100% is expert work that was not done.",
        ),
        (
            "phi",
            f"tau F / (tau F + Z), here {phi}: the FFN share under perfect balance, with F FFN "
            "and Z zero-computation experts. tau, the weight of the latter in the balance loss, "
            "sets it.",
        ),
        *terms,
    ]


def _facts(run: RunData) -> list[str]:
    config = run.config
    experts, parallel = config.moe, config.parallel
    layout = (
        f"TP {parallel.tensor_model_parallel_size}, PP {parallel.pipeline_model_parallel_size}, "
        f"EP {parallel.expert_model_parallel_size}, CP {parallel.context_parallel_size}"
    )
    precision = config.precision.dtype + (
        f" with {config.precision.fp8} fp8" if config.precision.fp8 else ""
    )
    return [
        f"{config.model.num_layers} layers, {len(config.moe_layers)} of them MoE",
        f"hidden {config.model.hidden_size}, expert FFN {config.expert_ffn_hidden_size}",
        f"{experts.summary} experts, top-{config.moe.router_topk}, tau {config.moe.tau:g}",
        layout,
        precision,
        f"batch {config.training.global_batch_size} x {config.model.seq_length} tokens",
    ]


def _sentence(run: RunData, summary: RunSummary) -> str:
    planned = run.config.training.train_iters
    done = f"{summary.last_step:,} of {planned:,} steps are done."
    if summary.last_step > planned:
        done = f"{summary.last_step:,} steps are done."
    if run.config.moe.num_zero_computation_experts == 0:
        kind = (
            "megatron-core's vanilla MoE layer" if run.config.moe.is_vanilla else "FFN experts only"
        )
        return (
            f"{done} This run has {kind}: every selection goes to an FFN expert, so there is "
            "nothing to save and nothing to compare with."
        )
    return (
        f"{done} In the last tenth of the records ({summary.window}) "
        f"{formatting.percent(summary.tail_ffn_fraction)} of all expert selections went to FFN "
        f"experts (perfect balance: {formatting.percent(summary.phi)}); the others took "
        "zero-computation experts and skipped the FFN and the all-to-all."
    )


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
    if run.config.moe.num_zero_computation_experts == 0:
        return [Card("FFN share", formatting.percent(summary.ffn_fraction), "vanilla: no others")]
    share = summary.tail_ffn_fraction
    note = f"{summary.window}; phi is {formatting.percent(summary.phi)}"
    cards = [
        Card("FFN share", formatting.percent(share), note, accent=True),
        Card(
            "Expert work saved",
            formatting.percent(1.0 - share),
            f"1 - FFN share, {summary.window}",
            accent=True,
        ),
    ]
    if not summary.a2a_bytes:
        cards.append(Card("All-to-all saved", "none", "no hidden vector left its rank"))
    elif savings.vanilla_a2a_bytes is not None:
        less = formatting.data_size(savings.vanilla_a2a_bytes - summary.a2a_bytes)
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


def _hardware_cards(run: RunData) -> list[Card]:
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
