"""A pilot's result in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from moepp_megatron.workbench.experiments.pilot.report import numbers
from moepp_megatron.workbench.experiments.pilot.report.tables import alerts, compute_rows
from moepp_megatron.workbench.experiments.pilot.report.target_table import (
    target_columns,
    target_rows,
)
from moepp_megatron.workbench.experiments.pilot.result import (
    Answer,
    ArmVerdict,
    Interval,
    PilotResult,
)
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.terminal import titled_table, wide_console

# From here on no number has to be broken into two lines.
_WIDE = 115
# Of the page's columns as many as a terminal has room for; the last one comes behind them.
_TARGET_COLUMNS = ("Layout", "Step", "Of vanilla's time", "Tokens/s/GPU", "Hours", "Cost")
_STYLES = {"pays": "bold green", "loses": "bold red", "open": "bold yellow", "none": "dim"}


def print_pilot(result: PilotResult) -> None:
    """The arms, what they are worth, the target, and the answer last, where it is seen."""
    console = wide_console()
    console.print(_arms(result, console.width >= _WIDE))
    console.print(_verdicts(result))
    for each in result.verdicts:
        console.print(_times(each), soft_wrap=True)
    for row in compute_rows(result):
        console.print(row.text, soft_wrap=True)
    if result.target is not None:
        console.print()
        console.print(_target(result, console.width >= _WIDE))
    for arm in result.arms:
        if any(arm.alerts.values()):
            console.print(f"alerts of {arm.arm.name}: {alerts(arm)}")
    for caveat in result.caveats:
        console.print(f"caveat: {caveat}", soft_wrap=True)
    console.print()
    console.print(result.answer, style="bold", soft_wrap=True)
    console.print(f"recommended: {numbers.recommendation(result)}")


def _arms(result: PilotResult, is_wide: bool) -> Table:
    table = titled_table(
        "arms; in brackets 95% intervals over seeds, of pairs with vanilla", narrow=True
    )
    table.add_column("arm")
    names = ("valid loss", "less vanilla's", "step", "over vanilla's", "tok/s", "FFN", "a2a MB")
    for name in names:
        table.add_column(name, justify="right", no_wrap=is_wide)
    for each in result.arms:
        table.add_row(
            each.arm.name,
            numbers.loss(each.valid_loss.mean),
            _interval(each.loss_difference, numbers.signed),
            numbers.seconds(each.step_time_s.mean),
            _interval(each.time_ratio, numbers.ratio),
            formatting.count(each.tokens_per_s.mean),
            formatting.percent(each.ffn_share.mean),
            numbers.megabytes(each.a2a_bytes.mean),
        )
    return table


def _interval(found: Interval | None, show: Callable[[float], str]) -> str:
    """Shorter than on the page: `0.861 [0.828, 0.895]`."""
    if found is None:
        return numbers.NOTHING
    if found.low is None or found.high is None:
        return show(found.mean)
    return f"{show(found.mean)} [{show(found.low)}, {show(found.high)}]"


def _verdicts(result: PilotResult) -> Table:
    table = titled_table("nats less vanilla's; 95% intervals in brackets", narrow=True)
    table.add_column("arm", no_wrap=True)
    for name in ("after vanilla's time", "at equal compute", "probability"):
        table.add_column(name, justify="right")
    table.add_column("answer")
    if result.target is not None:
        table.add_column("at the target")
    for each in result.verdicts:
        row: list[str | Text] = [
            each.arm,
            _interval(each.loss_in_time, numbers.signed),
            _interval(each.loss_in_compute, numbers.signed),
            numbers.probability(each.probability),
            _answer(each.at_pilot),
        ]
        if result.target is not None:
            row += [_answer(each.at_target)]
        table.add_row(*row)
    return table


def _times(verdict: ArmVerdict) -> str:
    """Time to vanilla's loss over vanilla's; below 1 MoE++ is there sooner."""
    here, there = verdict.time_to_loss, verdict.target_time_to_loss
    text = f"time to vanilla's loss, {verdict.arm}: {_interval(here, numbers.ratio)} of vanilla's"
    if there is None:
        return text
    return f"{text}, at the target {_interval(there, numbers.ratio)}"


def _answer(answer: Answer | None) -> Text:
    return Text(answer or numbers.NOTHING, style=_STYLES[numbers.answer_class(answer)])


def _target(result: PilotResult, is_wide: bool) -> Table:
    target = result.target
    assert target is not None, "the caller has one"
    tokens = formatting.big_count(target.tokens)
    table = titled_table(f"{target.title}, {tokens} tokens, by the cost model", narrow=True)
    table.add_column("model")
    table.add_column("layout")
    priced = target.price_per_hour is not None
    names = ["step", "over vanilla's", "tok/s/GPU", "hours", *(["cost"] if priced else [])]
    for name in (*names, "cost to vanilla's loss" if priced else "hours to vanilla's loss"):
        table.add_column(name, justify="right", no_wrap=is_wide)
    headings = target_columns(result)
    kept = [headings.index(name) for name in _TARGET_COLUMNS if name in headings]
    for row in target_rows(result):
        name = f"{row.name} ({row.note})" if row.note else row.name
        cells = [row.cells[index] for index in kept] + [row.cells[-1]]
        table.add_row(name, *(_cell(c.value, c.note) for c in cells))
    return table


def _cell(value: str, note: str) -> str:
    return f"{value} [{note}]" if note else value
