"""`pilot.html`: does MoE++ pay, how certain is the answer, and how to continue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.version import __version__
from moepp_megatron.workbench.experiments.pilot import sentences
from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.badges import Badge, badges
from moepp_megatron.workbench.experiments.pilot.report.commands import asking
from moepp_megatron.workbench.experiments.pilot.report.forest import forest_plot
from moepp_megatron.workbench.experiments.pilot.report.learning import curve_plots
from moepp_megatron.workbench.experiments.pilot.report.speed import speed_plot
from moepp_megatron.workbench.experiments.pilot.report.stages import Stage, stages
from moepp_megatron.workbench.experiments.pilot.report.tables import (
    ComputeRow,
    PilotRow,
    VerdictRow,
    WatchRow,
    arm_columns,
    arm_rows,
    compute_rows,
    has_energy,
    seeds,
    verdict_rows,
    watch_rows,
)
from moepp_megatron.workbench.experiments.pilot.report.target_table import (
    target_columns,
    target_rows,
)
from moepp_megatron.workbench.experiments.pilot.result import ArmVerdict, PilotResult
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.drawing import plot_style
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.template import render_template


@dataclass(frozen=True)
class _PilotPage:
    """Everything that the template shows; tables as text.

    Attributes:
        name: Name of the configuration.
        answer: One sentence.
        badges: The answers in a word.
        reasons: Numbers behind them, as sentences.
        facts: Short descriptions of the pilot.
        forest: Plot of the answer's uncertainty.
        verdicts: One row per MoE++ arm.
        speed: Loss over step time.
        computes: The table of equal compute.
        curves: Learning curves.
        arm_columns: Headings.
        arms: The table of arms.
        energy: Why the table has no energy; empty where it has.
        target_title: GPUs and tokens; None without a target.
        target_columns: Headings.
        target: The table of models.
        asking: How to ask for a target.
        stages: The roll-out.
        watch: What to watch in it.
        token_value: The value of tokens, as a sentence.
        caveats: Limits of the pilot.
        setting: Pairs of name and value.
        command: The command that was run.
        version: Version of this package.
    """

    name: str
    answer: str
    badges: list[Badge]
    reasons: list[str]
    facts: list[str]
    forest: Plot
    verdicts: list[VerdictRow]
    speed: Plot
    computes: list[ComputeRow]
    curves: list[Plot]
    arm_columns: list[str]
    arms: list[PilotRow]
    energy: str
    target_title: str | None
    target_columns: list[str]
    target: list[PilotRow]
    asking: str
    stages: list[Stage]
    watch: list[WatchRow]
    token_value: str
    caveats: list[str]
    setting: list[tuple[str, str]]
    command: str
    version: str


def write_pilot_page(result: PilotResult, out: Path) -> Path:
    """Writes the page, which needs no other file and no network.

    The page is ASCII, and the same result gives the same bytes.

    Args:
        result: The pilot's result.
        out: The file to write; its folder must exist.

    Returns:
        `out`.

    Raises:
        OSError: If it cannot be written; an existing page is then unchanged.
    """
    html = render_template("pilot.html.j2", page=_page(result))
    write_atomic(out, html.encode("ascii", "xmlcharrefreplace"))
    return out


def _page(result: PilotResult) -> _PilotPage:
    verdict = result.chosen
    outcome = result.outcome_of(verdict.arm) if verdict is not None else None
    with plot_style():
        forest, speed, curves = forest_plot(result), speed_plot(result), curve_plots(result)
    return _PilotPage(
        name=result.setting.config,
        answer=result.answer,
        badges=badges(result),
        reasons=_reasons(verdict),
        facts=_facts(result),
        forest=forest,
        verdicts=verdict_rows(result),
        speed=speed,
        computes=compute_rows(result),
        curves=curves,
        arm_columns=arm_columns(result),
        arms=arm_rows(result),
        energy="" if has_energy(result) else f"Energy per token: {numbers.NOT_MEASURED}.",
        target_title=_target_title(result),
        target_columns=target_columns(result),
        target=target_rows(result),
        asking=asking(result),
        stages=stages(result),
        watch=watch_rows(outcome) if outcome is not None and result.recommended else [],
        token_value=_token_value(result),
        caveats=result.caveats,
        setting=_setting(result),
        command=result.setting.command,
        version=__version__,
    )


def _reasons(verdict: ArmVerdict | None) -> list[str]:
    if verdict is None:
        return []
    chances = sentences.chances(verdict.probability, verdict.stakes)
    return [*verdict.reasons, *([chances] if chances else [])]


def _facts(result: PilotResult) -> list[str]:
    setting = result.setting
    count = max((len(outcome.seeds) for outcome in result.arms), default=0)
    return [
        f"{len(result.arms)} arms, {seeds(count)} each",
        f"speed over {setting.sessions} session{'' if setting.sessions == 1 else 's'}",
        f"{setting.steps:,} steps of {formatting.big_count(setting.tokens / setting.steps)} tokens"
        if setting.steps
        else "no steps",
        f"{formatting.big_count(setting.parameters)} parameters",
        f"{setting.nproc} x {setting.device}",
        setting.began,
    ]


def _target_title(result: PilotResult) -> str | None:
    target = result.target
    if target is None:
        return None
    text = f"{target.title}, {formatting.big_count(target.tokens)} tokens"
    if target.price_per_hour is None:
        return text + "; no price was given (--price)"
    return f"{text}, {target.price_per_hour:,.2f} per GPU and hour"


def _token_value(result: PilotResult) -> str:
    value = numbers.with_ends(result.token_value, numbers.loss)
    return (
        f"Tokens: an e-fold of them (2.72 times as many) is worth {value} nats to vanilla here, by "
        "its runs with fewer steps. With that a loss difference becomes a token factor."
    )


def _looks(result: PilotResult) -> str:
    setting = result.setting
    after = f"the next one after {setting.next_seeds} seeds"
    if setting.look == 0:
        return f"none yet; {after}"
    return f"number {setting.look}, one-sided level {setting.level:.3g}; {after}"


def _setting(result: PilotResult) -> list[tuple[str, str]]:
    setting = result.setting
    used = sorted({seed for outcome in result.arms for seed in outcome.seeds})
    return [
        ("Configuration", setting.config),
        ("Seeds", ", ".join(map(str, used)) or "none"),
        ("Looks", _looks(result)),
        ("Steps and tokens of a run", f"{setting.steps:,} and {setting.tokens:,}"),
        ("Validation tokens", f"{setting.valid_tokens:,}"),
        ("Parameters of the MoE++ model", f"{setting.parameters:,}"),
        ("Ranks", f"{setting.nproc} on {setting.device}, {setting.cores} processor cores"),
        ("Versions", f"torch {setting.torch}, megatron-core {setting.megatron_core}"),
        ("Began", setting.began),
    ]
