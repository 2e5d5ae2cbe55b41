"""Several runs on one page: results, curves over each other, and the settings that differ."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.load import parse_config
from moepp_megatron.config.origins import leaves
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.tools.report.run_data import ReportError, RunData, load_run, name_below
from moepp_megatron.tools.report.summary import RunSummary, finite_mean, step_weights, summarize

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


@dataclass(frozen=True)
class ComparedRun:
    """One run among others.

    Attributes:
        settings: Its configuration, `section.key` to a value as text.
        tokens: Tokens trained on at each record, [n] float64.
        seconds: Time in training steps until each record, [n] float64; NaN from a record on that
            has no step time.
        flops: Model FLOPs until each record, [n] float64, counted as for the MFU; None where this
            version does not read the configuration.
    """

    name: str
    data: RunData
    summary: RunSummary
    settings: dict[str, str]
    tokens: np.ndarray
    seconds: np.ndarray
    flops: np.ndarray | None


@dataclass(frozen=True)
class ComparedSetting:
    """A setting that differs."""

    name: str
    values: list[str]


def load_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read runs; one that is named twice is read once.

    Raises:
        ReportError: Fewer than two runs, too many, or one that cannot be read.
    """
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


def _compared(run: RunData, name: str) -> ComparedRun:
    times = run.numbers.values("step_time_s")
    times[~np.isfinite(times)] = math.nan
    return ComparedRun(
        name=name,
        data=run,
        summary=summarize(run),
        settings=_flat(parse_yaml(run.config_text, str(run.folder / CONFIG_FILE))),
        tokens=run.numbers.values("tokens"),
        seconds=np.cumsum(step_weights(run.records.steps) * times),
        flops=_flops(run),
    )


def _flops(run: RunData) -> np.ndarray | None:
    """Model FLOPs until each record; None where this version does not read the configuration."""
    try:
        config = parse_config(parse_yaml(run.config_text, CONFIG_FILE))
    except ConfigError:
        return None
    # Linear in the FFN share, so that two points give all.
    none, whole = (training_flops_per_token(config, share) for share in (0.0, 1.0))
    tokens = np.diff(run.numbers.values("tokens"), prepend=0.0)
    shares = run.numbers.values("ffn_fraction")
    shares[~np.isfinite(shares)] = math.nan
    return np.cumsum(tokens * (none + (whole - none) * shares))


def _flat(content: Mapping[str, Any]) -> dict[str, str]:
    """`section.key` to a value as one line of YAML."""
    return {".".join(map(str, names)): _line(value) for names, value in leaves(content)}


def _line(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.strip().removesuffix("...").strip()


def differing_settings(runs: Sequence[ComparedRun]) -> list[ComparedSetting]:
    """The settings that are not equal in all runs, in the order of the configuration."""
    names = dict.fromkeys(itertools.chain.from_iterable(run.settings for run in runs))
    differing = []
    for name in names:
        values = [run.settings.get(name, "-") for run in runs]
        if name not in _NOT_COMPARED and len(set(values)) > 1:
            differing.append(ComparedSetting(name, [_cut(value) for value in values]))
    return differing


def _cut(value: str) -> str:
    if len(value) <= _LONGEST_VALUE:
        return value
    return f"{value[:_LONGEST_VALUE]} ... ({len(value):,} characters)"


def losses_differ_in_meaning(settings: Sequence[ComparedSetting]) -> list[str]:
    """Names of differing settings with which losses do not compare."""
    return [setting.name for setting in settings if setting.name in _DECIDE_THE_LOSS]


def common_end(axes: Sequence[np.ndarray | None]) -> float | None:
    """Return the end all runs reach on an axis; None where one is not known.

    Args:
        axes: Tokens, seconds or FLOPs of each run, [n] each.
    """
    ends = [math.nan if a is None else float(np.nanmax(a, initial=-math.inf)) for a in axes]
    return min(ends) if all(math.isfinite(end) for end in ends) else None


def loss_at(run: ComparedRun, axis: np.ndarray, end: float) -> float:
    """Mean training loss over the last tenth of an axis before `end`, nats; NaN without one."""
    reached = np.flatnonzero(axis <= end * (1 + 1e-9))
    if not len(reached):
        return math.nan
    losses = run.data.numbers.values("loss")[reached]
    # At least the last record that every run has reached.
    near = axis[reached] > end * (1 - _END)
    near[-1] = True
    return finite_mean(losses[near])
