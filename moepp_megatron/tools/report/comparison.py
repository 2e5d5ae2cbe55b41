"""`comparison.html`: several runs over each other, and the settings that differ."""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.load import leaves, parse_config
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Block,
    Cell,
    Page,
    PageSection,
    Plot,
    Table,
    Text,
    number,
    write_blocks,
)
from moepp_megatron.tools.report.drawing import LINE_COLOURS, envelope, plot_style, short_name
from moepp_megatron.tools.report.lines import Dashes, Frame, PlotLine, line_plot
from moepp_megatron.tools.report.run_data import ReportError, RunData, load_run, name_below
from moepp_megatron.tools.report.series import finite
from moepp_megatron.tools.report.summary import RunSummary, finite_mean, step_weights, summarize

DEFAULT_OUT = Path("comparison.html")
# Beyond these a plot's lines can no longer be distinguished.
_MOST_RUNS = 24
# Share of a common range, at its end, over which a loss is averaged.
_END = 0.1
# The folder is the run's name on the page.
_NOT_COMPARED = ("run.dir",)
_LONGEST_VALUE = 120
# Where one of these differs, so does what the loss is a mean of.
_DECIDE_THE_LOSS = (
    *("model.vocab_size", "model.seq_length"),
    *("data.path", "data.blend", "data.stages", "data.tokenizer"),
)
_DASHES: tuple[Dashes, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
# Colours first, then the next dashes.
_LOOKS = [(colour, dashes) for dashes in _DASHES for colour in LINE_COLOURS]


@dataclass(frozen=True)
class _ComparedRun:
    """One run among others."""

    name: str
    data: RunData
    summary: RunSummary
    settings: dict[str, str]  # its configuration, `section.key` to a value as text
    # [n] float64 at each record: `tokens` trained on; `seconds` in training steps (NaN from a
    # record on that has no step time); `flops`, model FLOPs as for the MFU, which are missing where
    # this version does not read the configuration.
    axes: Mapping[str, np.ndarray]


def build_comparison(folders: Sequence[Path], out: Path = DEFAULT_OUT) -> Path:
    """Write a page that lays runs over each other, and return `out`.

    ReportError if a run is missing, incomplete or inconsistent, or the page cannot be written.
    """
    return write_blocks(out, _page(_load_runs(folders)))


def _load_runs(folders: Sequence[Path]) -> list[_ComparedRun]:
    """Read 2 to `_MOST_RUNS` different runs; ReportError if one cannot be read."""
    # By their real paths, and read by the names that were given, which messages repeat.
    given = {Path(os.path.realpath(folder)): folder for folder in folders}
    if not 2 <= len(given) <= _MOST_RUNS:
        raise ReportError(
            f"RUN ({len(given)} different folders) must be 2 to {_MOST_RUNS} to be compared; "
            "name other runs, or a single one for its own page"
        )
    runs = [load_run(folder) for folder in given.values()]
    return [_compared(run, name) for run, name in zip(runs, _names(list(given)), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    base = Path(os.path.commonpath(folders))
    names = [name_below(base, folder) for folder in folders]
    # A run inside another's folder may bear its name.
    return names if len(set(names)) == len(names) else [name_below(Path("/"), f) for f in folders]


def _compared(run: RunData, name: str) -> _ComparedRun:
    content = parse_yaml(run.config_text, str(run.folder / CONFIG_FILE))
    times, tokens = (_known(run, key) for key in ("step_time_s", "tokens"))
    axes = {"tokens": tokens, "seconds": np.cumsum(step_weights(run.records.steps) * times)}
    try:
        config = parse_config(content)
    except ConfigError:
        pass
    else:
        # Linear in the FFN share, so that two points give all.
        none, whole = (training_flops_per_token(config, share) for share in (0.0, 1.0))
        per_token = none + (whole - none) * _known(run, "ffn_fraction")
        axes["flops"] = np.cumsum(np.diff(tokens, prepend=0.0) * per_token)
    settings = {".".join(map(str, names)): _line(value) for names, value in leaves(content)}
    return _ComparedRun(name, run, summarize(run), settings, axes)


def _known(run: RunData, key: str) -> np.ndarray:
    values = run.numbers.values(key)
    values[~np.isfinite(values)] = math.nan
    return values


def _line(value: object) -> str:
    """A value as one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def _differing_settings(runs: Sequence[_ComparedRun]) -> dict[str, list[str]]:
    """The values of settings that are not equal in all runs, in the order of the configuration."""
    names = dict.fromkeys(itertools.chain.from_iterable(run.settings for run in runs))
    rows = {name: [run.settings.get(name, "-") for run in runs] for name in names}
    return {
        name: [_cut(value) for value in values]
        for name, values in rows.items()
        if name not in _NOT_COMPARED and len(set(values)) > 1
    }


def _cut(value: str) -> str:
    if len(value) <= _LONGEST_VALUE:
        return value
    return f"{value[:_LONGEST_VALUE]} ... ({len(value):,} characters)"


def _common_end(runs: Sequence[_ComparedRun], axis: str) -> float | None:
    """The end that all runs reach on an axis; None where that of one is not known."""
    ends = [
        float(np.nanmax(run.axes[axis], initial=-math.inf)) if axis in run.axes else math.nan
        for run in runs
    ]
    return min(ends) if all(math.isfinite(end) for end in ends) else None


def _loss_at(run: _ComparedRun, axis: str, end: float) -> float:
    """Mean training loss over the last tenth of an axis before `end`, nats; NaN without one."""
    places = run.axes[axis]
    reached = np.flatnonzero(places <= end * (1 + 1e-9))
    if not len(reached):
        return math.nan
    losses = run.data.numbers.values("loss")[reached]
    # At least the last record that every run has reached.
    near = places[reached] > end * (1 - _END)
    near[-1] = True
    return finite_mean(losses[near])


def _page(runs: Sequence[_ComparedRun]) -> Page:
    settings = _differing_settings(runs)
    names = [run.name for run in runs]
    results = [[Cell(run.name), *(number(show(run)) for show in _RESULTS.values())] for run in runs]
    caption = (
        "Loss and FFN share: means over the last tenth of a run's records. Validation: the newest, "
        "with its step. Step time and tokens/s: medians. Model FLOP: forward and backward pass, "
        "without experts that tokens did not take."
    )
    with plot_style():
        plots = _plots(runs)
    sections: dict[str, Sequence[Block]] = {
        "Results": [Table(("Run", *_RESULTS), results, caption)],
        "Loss where all have come equally far": _losses(runs),
        "Curves": plots,
        "Settings that differ": [_settings(settings, names)],
    }
    named = len(settings.keys() - {"run.name"})
    differ = "1 setting differs" if named == 1 else f"{named} settings differ"
    return Page(
        kind="MoE++ runs compared",
        title=", ".join(names),
        lead=f"{len(runs)} runs; {differ} besides their folders and names.",
        warnings=_warnings(runs, settings),
        sections=[PageSection(title, blocks) for title, blocks in sections.items() if blocks],
        sources="config.yaml and metrics.jsonl of each run",
        command="moepp report RUN RUN...",
    )


def _settings(settings: Mapping[str, Sequence[str]], names: Sequence[str]) -> Block:
    if not settings:
        return Text(["All settings are equal but for the folders."], "nothing")
    rows = [[Cell(name, "code"), *map(Cell, values)] for name, values in settings.items()]
    caption = "From each run's config.yaml; a dash: the run has no such setting."
    return Table(("Setting", *names), rows, caption)


def _warnings(runs: Sequence[_ComparedRun], settings: Mapping[str, Sequence[str]]) -> list[str]:
    warnings = []
    names = [name for name in settings if name in _DECIDE_THE_LOSS]
    if names:
        warnings.append(f"Losses may not be comparable: {', '.join(names)} differ.")
    short = [
        f"{run.name} ({run.summary.last_step:,} of {run.data.config.training.train_iters:,})"
        for run in runs
        if run.summary.last_step < run.data.config.training.train_iters
    ]
    if short:
        warnings.append(
            f"Not all planned steps are done: {', '.join(short)}. A learning rate that has not "
            "fallen to its end keeps a loss up."
        )
    return warnings


def _validation(run: _ComparedRun) -> str:
    loss = run.summary.valid_loss
    return "none" if loss is None else f"{formatting.number(loss)} at {run.summary.valid_step:,}"


def _step_time(run: _ComparedRun) -> str:
    times = run.data.numbers.series("step_time_s").y
    return f"{formatting.significant(float(np.median(times)))} s" if len(times) else "-"


# Columns: a heading, and a run's text below it.
_RESULTS: dict[str, Callable[[_ComparedRun], str]] = {
    "Steps": lambda r: f"{r.summary.last_step:,} of {r.data.config.training.train_iters:,}",
    "Tokens": lambda run: formatting.big_count(run.summary.tokens),
    "Loss": lambda run: formatting.or_dash(run.summary.tail_loss),
    "Validation": _validation,
    "FFN share": lambda run: formatting.percent(run.summary.tail_ffn_fraction),
    "Step time": _step_time,
    "Tokens/s": lambda run: formatting.count(run.summary.tokens_per_s),
    "Training time": lambda run: formatting.duration(run.summary.train_seconds),
    "Model FLOP": lambda run: formatting.or_dash(
        run.axes.get("flops", [math.nan])[-1], formatting.flops
    ),
}
# How the end of each axis is written.
_ENDS: dict[str, Callable[[float], str]] = {
    "tokens": lambda end: f"{formatting.big_count(end)} tokens",
    "seconds": formatting.duration,
    "flops": formatting.flops,
}


def _losses(runs: Sequence[_ComparedRun]) -> list[Table]:
    """The runs' losses where each has come equally far, by tokens, time and FLOPs."""
    ends = {axis: end for axis in _ENDS if (end := _common_end(runs, axis)) is not None}
    if not ends:
        return []
    head = ("Training loss (nats) after", *(_ENDS[axis](end) for axis, end in ends.items()))
    rows = [
        [Cell(run.name), *(number(formatting.or_dash(_loss_at(run, *end))) for end in ends.items())]
        for run in runs
    ]
    caption = "As far as the shortest run reaches; means over the last tenth before it."
    return [Table(head, rows, caption)]


def _plots(runs: Sequence[_ComparedRun]) -> list[Plot]:
    """Plot loss and FFN share of all runs over the tokens that they were trained on."""

    def validation(axes: Axes) -> None:
        for run, (colour, _) in zip(runs, _LOOKS, strict=False):
            x, y = finite(run.axes["tokens"], run.data.numbers.values("valid_loss"))
            axes.plot(*envelope(x, y), "D", color=colour, markersize=4.5)

    loss = Frame("loss (nats)", x="tokens", wide=True, height=4.0, change=validation)
    share = Frame("FFN share", formatting.percent, "tokens", 0, 1.02, wide=True, height=3.6)
    about_loss = "Token mean over the global batch. Diamonds: validation loss."
    about_share = "What lies below 100% is expert work that was not done."
    return [
        _plot(runs, "Loss over tokens", "loss", about_loss, loss),
        _plot(runs, "FFN share of all selections", "ffn_fraction", about_share, share),
    ]


def _plot(runs: Sequence[_ComparedRun], title: str, key: str, caption: str, frame: Frame) -> Plot:
    """Plot one number of all runs; runs without two points are named instead."""
    lines, absent = [], []
    for run, look in zip(runs, _LOOKS, strict=False):
        points = finite(run.axes["tokens"], run.data.numbers.values(key))
        lines.append(PlotLine(short_name(run.name), points, *look))
        absent += [run.name] if len(points.x) < 2 else []
    if absent:
        caption += f" Fewer than two points: {', '.join(absent)}."
    return line_plot(title, caption, lines, frame)
