"""The page of a run: numbers, plots and configuration."""

from pathlib import Path

from moepp_megatron.file_names import REPORT_PAGE
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.alerts import alert_blocks
from moepp_megatron.tools.report.blocks import (
    Block,
    Cell,
    Page,
    PageSection,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.cards import hardware_cards, headline_cards
from moepp_megatron.tools.report.comparison import DEFAULT_OUT, build_comparison
from moepp_megatron.tools.report.curves import curve_plots, section_plots
from moepp_megatron.tools.report.drawing import plot_style
from moepp_megatron.tools.report.expert_plots import expert_plots
from moepp_megatron.tools.report.healthy import METRICS, wrong_text
from moepp_megatron.tools.report.router_health_plots import health_plots
from moepp_megatron.tools.report.run_data import RunData, load_run
from moepp_megatron.tools.report.savings import Savings, compute_savings, savings_table
from moepp_megatron.tools.report.summary import RunSummary, summarize
from moepp_megatron.tools.report.token_groups import source_table, token_plots


def build_report(folder: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, or with several runs the page that compares them.

    One run's page is made of its configuration, metrics and alerts. A page is ASCII, needs no other
    file and makes no network requests. The same inputs give the same bytes.

    Args:
        out: The page; by default `report.html` in the run's folder, and `comparison.html` in the
            working directory for several runs.

    Returns:
        Path of the page.

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
        cards=[*headline_cards(run, summary, savings), *hardware_cards(run)],
        sections=sections,
        sources="config.yaml, metrics.jsonl and alerts.jsonl",
        command="moepp report RUN",
    )


def _sections(run: RunData, summary: RunSummary, savings: Savings) -> list[PageSection]:
    """All that the run has something for."""
    saved = run.config.experts.num_zero_computation_experts > 0
    health, sources = health_plots(run), source_table(run)
    terms = [[Cell(term), Cell(text, "comment")] for term, text in _terms(run, summary)]
    by_section: dict[str, list[Block]] = {
        "What MoE++ saved against a vanilla layer of the same size": [
            *([savings_table(run, summary, savings)] if saved else [])
        ],
        "Training": [*curve_plots(run)],
        "Experts": [*expert_plots(run)],
        "Data sources and kinds of tokens": [*([sources] if sources else []), *token_plots(run)],
        "Router health": [*([Text([_HEALTH], "note")] if health else []), *health],
        "Alerts": alert_blocks(run),
        "Hardware": [*section_plots(run, "hardware")],
        "What the numbers mean": [Table((), terms), *([_healthy()] if health else [])],
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


def _healthy() -> Table:
    rows = [
        [
            Cell(name, "code"),
            Cell(row.meaning, "comment"),
            number(row.healthy),
            Cell(wrong_text(row.wrong), "comment"),
        ]
        for name, row in METRICS.items()
    ]
    head = ("Metric", "What it is", "Healthy, layer by layer", "Something is wrong")
    caption = (
        "Ranges of a healthy run of the quickstart model, 12 experts. Names in parentheses are "
        "rules of the routing guard."
    )
    return Table(head, rows, caption)


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
    if run.config.experts.num_zero_computation_experts == 0:
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
    experts, parallel = config.experts, config.parallel
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
    if run.config.experts.num_zero_computation_experts == 0:
        kind = "megatron-core's vanilla MoE layer" if run.config.is_vanilla else "FFN experts only"
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
