"""Data sources, classes of tokens and tasks: a table of sources, and plots over steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moepp_megatron.data.token_groups import BANDS
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.blocks import Cell, Table, number
from moepp_megatron.workbench.report.drawing import LINE_COLOURS, short_name
from moepp_megatron.workbench.report.lines import Frame, Line, line_plot
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.run_data import RunData
from moepp_megatron.workbench.report.series import series, values
from moepp_megatron.workbench.report.summary import finite_mean, tail


@dataclass(frozen=True)
class Lines:
    """A plot of one number by name over steps.

    Attributes:
        key: Key of the records.
        title: Heading.
        axis: Label of the vertical axis.
        caption: Text below it.
        names: What is drawn, in order.
        is_share: Whether the number is one.
        is_rare: Whether few records have it, so that each is a mark and one is enough.
    """

    key: str
    title: str
    axis: str
    caption: str
    names: Sequence[str]
    is_share: bool = False
    is_rare: bool = False


def source_table(run: RunData) -> Table | None:
    """The data sources, those of the most tokens first; None where all is of one source."""
    records = [record for record in run.records if record.source_tokens]
    if not records:
        return None
    newest = tail(records)
    before = tail(records[: -len(newest)]) if len(records) > len(newest) else []
    rows = []
    for name in _sources(run):
        loss = _mean(newest, "source_loss", name)
        change = loss - _mean(before, "source_loss", name)
        rows.append(
            [
                Cell(name),
                number(formatting.percent(_mean(newest, "source_tokens", name))),
                number(_shown(loss)),
                number(f"{change:+.3f}" if math.isfinite(change) else "-"),
                number(_shown(_mean(newest, "source_ffn_share", name), formatting.percent)),
                Cell(_busiest(run, newest, name)),
            ]
        )
    head = ("Data source", "Tokens", "Loss", "Change", "FFN share", "Busiest expert")
    caption = "Means over the last tenth of the records; the change is that since the tenth before."
    return Table(head, rows, caption)


def token_plots(run: RunData) -> list[Plot]:
    """The plots that the records have numbers for."""
    # The table has all sources.
    sources = _sources(run)[: len(LINE_COLOURS)]
    classes = list(dict.fromkeys(n for r in run.records for n in r.class_ffn_per_token or {}))
    more = "" if len(sources) == len(_sources(run)) else " The sources with the most tokens."
    scores = list(dict.fromkeys(n for r in run.records for n in r.task_score or {}))
    of_class = "FFN experts per token, mean over MoE layers, of the tokens"
    sets = list(dict.fromkeys(n for r in run.records for n in r.valid_set_loss or {}))
    plots = [
        Lines("valid_set_loss", "Loss by validation set", "loss (nats)",
              "Language-model loss of each set of data.validation.", sets[: len(LINE_COLOURS)]),
        Lines("source_loss", "Loss by data source", "loss (nats)",
              f"Mean language-model loss behind the tokens of each source.{more}", sources),
        Lines("source_ffn_share", "FFN share by data source", "FFN share",
              f"FFN experts' share of the selections of each source's tokens.{more}", sources,
              is_share=True),
        Lines("class_ffn_per_token", "FFN experts by frequency of the token", "FFN experts",
              f"{of_class} of ids by how frequent they are in the training set.",
              [name for name in classes if name in BANDS]),
        Lines("class_ffn_per_token", "FFN experts by kind of token", "FFN experts",
              f"{of_class} of ids by their characters; a keyword is any that is spelt like one.",
              [name for name in classes if name not in BANDS]),
        Lines("task_score", "Scores of tasks", "score",
              "Scores of the tasks of evaluation.tasks by their metrics, as lm-eval computes them.",
              scores[: len(LINE_COLOURS)], is_rare=True),
    ]  # fmt: skip
    drawn = [_plot(run, lines) for lines in plots if lines.names]
    return [plot for plot in drawn if plot is not None]


def _sources(run: RunData) -> list[str]:
    """Names of the sources, those of the most tokens in the run first."""
    tokens: dict[str, float] = {}
    for record in run.records:
        for name, share in (record.source_tokens or {}).items():
            tokens[name] = tokens.get(name, 0.0) + share
    return sorted(tokens, key=lambda name: -tokens[name])


def _plot(run: RunData, wanted: Lines) -> Plot | None:
    """The plot; None if no name has enough finite numbers."""
    lines = [
        Line(
            short_name(name),
            series(run.records, wanted.key, name),
            colour,
            marker="o" if wanted.is_rare else "",
        )
        for name, colour in zip(wanted.names, LINE_COLOURS, strict=False)
    ]
    lines = [line for line in lines if len(line.points.x) >= (1 if wanted.is_rare else 2)]
    if not lines:
        return None
    show = formatting.percent if wanted.is_share else formatting.number
    frame = Frame(wanted.axis, show, alerts=run.alerts)
    return line_plot(wanted.title, wanted.caption, lines, frame)


def _mean(records: Sequence[StepMetrics], key: str, name: str) -> float:
    """Mean over the records in which the source has a token; NaN where none has."""
    return finite_mean(values(records, key, name).tolist())


def _busiest(run: RunData, records: Sequence[StepMetrics], name: str) -> str:
    names = run.config.experts.names
    rows = [(record.source_expert_share or {}).get(name) for record in records]
    shares = np.asarray([row for row in rows if row and len(row) == len(names)])
    if shares.size == 0:
        return "-"
    means = shares.mean(axis=0)
    return f"{names[int(means.argmax())]}, {formatting.percent(float(means.max()))}"


def _shown(value: float, show: Callable[[float], str] = formatting.number) -> str:
    return show(value) if math.isfinite(value) else "-"
