"""Puts numbers, plots and configuration into the page's template."""

from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.version import __version__
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.alerts import AlertTable, alert_table, watched
from moepp_megatron.workbench.report.cards import Card, headline_cards
from moepp_megatron.workbench.report.comparison_page import DEFAULT_OUT, build_comparison
from moepp_megatron.workbench.report.curves import curve_plots
from moepp_megatron.workbench.report.drawing import plot_style
from moepp_megatron.workbench.report.expert_plots import expert_plots
from moepp_megatron.workbench.report.hardware import hardware_cards, hardware_plots
from moepp_megatron.workbench.report.healthy import HealthyMetric, metrics_in_words
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.router_health_plots import health_plots
from moepp_megatron.workbench.report.run_data import RunData, load_run
from moepp_megatron.workbench.report.savings import compute_savings
from moepp_megatron.workbench.report.savings_table import SavingsTable, savings_table
from moepp_megatron.workbench.report.summary import RunSummary, summarize
from moepp_megatron.workbench.report.template import render_template, write_page
from moepp_megatron.workbench.report.token_groups import SourceRow, source_table, token_plots


@dataclass(frozen=True)
class Page:
    """Everything that the template shows.

    Attributes:
        name: The run's name.
        facts: Short descriptions of the run, such as its layout.
        sentence: The run's result, in words.
        cards: Headline numbers.
        curves: Plots over steps.
        experts: Plots over experts.
        sources: Numbers by data source; empty where all is of one source.
        tokens: Plots by data source and by class of tokens.
        health: Plots of the routers' health; empty for a vanilla run.
        alerts: The run's alerts; None without any.
        watched: What the routing guard watched; empty where that is not known.
        hardware: Plots of the run's use of machines; empty without telemetry.
        table: The comparison with the vanilla layer; None for a vanilla run.
        terms: The meanings of the page's terms.
        healthy: The healthy range of each metric of the routers, and signs of problems.
        config_text: The resolved configuration.
        version: Version of this package.
    """

    name: str
    facts: list[str]
    sentence: str
    cards: list[Card]
    curves: list[Plot]
    experts: list[Plot]
    sources: list[SourceRow]
    tokens: list[Plot]
    health: list[Plot]
    alerts: AlertTable | None
    watched: str
    hardware: list[Plot]
    table: SavingsTable | None
    terms: list[tuple[str, str]]
    healthy: list[HealthyMetric]
    config_text: str
    version: str


def build_report(folder: str | Path, *others: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's page, or with several runs the page that compares them.

    One run's page is made of its configuration, metrics and alerts. A page is ASCII, needs no other
    file and makes no network requests. The same inputs give the same bytes.

    Args:
        folder: A run's folder.
        others: Folders of runs to compare it with.
        out: The page; by default `report.html` in the run's folder, and `comparison.html` in the
            working directory for several runs.

    Returns:
        Path of the page.

    Raises:
        ReportError: A run is missing, incomplete or inconsistent, or the page cannot be written.
    """
    if others:
        return build_comparison([Path(folder), *map(Path, others)], Path(out or DEFAULT_OUT))
    path = Path(out or Path(folder) / "report.html")
    write_page(path, render(load_run(Path(folder))))
    return path


def render(run: RunData) -> str:
    """The page's HTML."""
    summary = summarize(run)
    savings = compute_savings(run.config, summary)
    has_savings = run.config.experts.num_zero_computation_experts > 0
    with plot_style():
        curves, experts, health = curve_plots(run), expert_plots(run), health_plots(run)
        hardware, tokens = hardware_plots(run), token_plots(run)
    alerts = alert_table(run)
    page = Page(
        name=run.config.run.name,
        facts=_facts(run),
        sentence=_sentence(run, summary),
        cards=[*headline_cards(run, summary, savings), *hardware_cards(run)],
        curves=curves,
        experts=experts,
        sources=source_table(run),
        tokens=tokens,
        health=health,
        alerts=alerts,
        watched=watched(run),
        hardware=hardware,
        table=savings_table(run, summary, savings) if has_savings else None,
        terms=_terms(run, summary),
        healthy=metrics_in_words(),
        config_text=run.config_text,
        version=__version__,
    )
    return render_template("report.html.j2", page=page)


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
        f"{formatting.percent(summary.settled_ffn_fraction)} of all expert selections went to FFN "
        f"experts (perfect balance: {formatting.percent(summary.phi)}); the others took "
        "zero-computation experts and skipped the FFN and the all-to-all."
    )
