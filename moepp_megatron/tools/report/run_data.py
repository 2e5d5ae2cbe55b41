"""Reads the data of a report: a run's resolved configuration, its records and alerts."""

import shlex
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from moepp_megatron.config.errors import ConfigError, first_misfit
from moepp_megatron.config.paths import looked_at
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.config.schema.section import LARGEST, LARGEST_OF_ALL
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.experts import ExpertLayout
from moepp_megatron.file_names import ALERTS_FILE, CONFIG_FILE, METRICS_FILE, RUN_FILES
from moepp_megatron.observe.alerts import Alert, read_alerts
from moepp_megatron.observe.metrics import MetricsError, Records, StepMetrics, read_metrics
from moepp_megatron.runtime.printable import printable
from moepp_megatron.tools.report.series import Numbers

# Runs of a folder that a message names.
_NAMED_RUNS = 5

# A run's folder may come from elsewhere: what it counts is bounded as in the configuration.
Layers = Annotated[int, Field(ge=1, le=LARGEST["layers"])]
Experts = Annotated[int, Field(ge=0, le=LARGEST["experts"])]
Count = Annotated[int, Field(ge=1, le=LARGEST_OF_ALL)]


class ReportError(ConfigError):
    """A run that no report can be made of; the message is one line."""


class _Run(BaseModel):
    name: str = "moepp"


class _ModelFacts(BaseModel):
    num_layers: Layers
    hidden_size: Count
    ffn_hidden_size: Count
    vocab_size: Count
    seq_length: Count


class _Budget(BaseModel):
    target_ffn_per_token: float | None = None


class _MoE(BaseModel, ExpertLayout, frozen=True):
    tau: float
    layer_freq: Layers | list[int] = 1
    ffn_hidden_size: Count | None = None
    dispatcher: str = "alltoall"
    budget: _Budget = _Budget()


class _Parallel(BaseModel):
    tensor_model_parallel_size: Count = 1
    pipeline_model_parallel_size: Count = 1
    expert_model_parallel_size: Count = 1
    context_parallel_size: Count = 1


class _Precision(BaseModel):
    dtype: str = "fp32"
    fp8: str | None = None


class _Training(BaseModel):
    train_iters: Count
    global_batch_size: Count


class RunConfig(BaseModel):
    """The part of a resolved ``config.yaml`` that the report reads, section by section.

    As it has a reader of its own, a run of another version of the schema can still be reported.
    """

    run: _Run
    model: _ModelFacts
    moe: _MoE
    parallel: _Parallel
    precision: _Precision
    training: _Training
    # As recorded: another version may have other settings.
    routing_guard: dict[str, Any] = {}

    @property
    def phi(self) -> float:
        """Target of the FFN share of all selections: the budget's, or that of perfect balance."""
        target = self.moe.budget.target_ffn_per_token
        if target is not None:
            return target / self.moe.router_topk
        return self.moe.phi(self.moe.tau)

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Hidden width of one FFN expert."""
        return self.moe.ffn_hidden_size or self.model.ffn_hidden_size

    @property
    def moe_layers(self) -> list[int]:
        """Transformer layers, counted from 1, that are MoE layers (megatron's moe_layer_freq)."""
        frequency = self.moe.layer_freq
        if isinstance(frequency, int):
            pattern = [int(i % frequency == 0) for i in range(self.model.num_layers)]
        else:
            pattern = frequency
        return [i for i, is_moe in enumerate(pattern, start=1) if is_moe]


@dataclass(frozen=True)
class RunData:
    """A run as read from its folder."""

    folder: Path
    config: RunConfig
    config_text: str
    records: Records  # at least one, steps strictly increasing
    numbers: Numbers  # what pages need of them
    # In the order of time, including those of steps that were repeated.
    alerts: list[Alert] = field(default_factory=list)


def runs_inside(folder: Path) -> list[Path]:
    """The folders of runs directly in a folder, by name; none where it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if _is_run(path))
    except OSError:
        return []


def _is_run(path: Path) -> bool:
    # A link such as `latest` would be a second name of the same run.
    return not path.is_symlink() and any((path / name).is_file() for name in RUN_FILES)


def refuse_folder_of_runs(folder: Path) -> None:
    """Refuse a folder that holds runs and is none itself; the ReportError names them."""
    runs = runs_inside(folder)
    if runs:
        named = " ".join(shlex.quote(str(run)) for run in runs[:_NAMED_RUNS])
        rest = f" and {len(runs) - _NAMED_RUNS} more" if len(runs) > _NAMED_RUNS else ""
        raise ReportError(f"{folder}: holds runs and is none itself; name one: {named}{rest}")


def load_run(folder: Path) -> RunData:
    """Read a run's ``config.yaml``, ``metrics.jsonl`` and, where there is one, ``alerts.jsonl``.

    ReportError if the folder or a file is missing or unreadable, or they do not fit together.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder}: is not a folder{looked_at(folder)}; name the folder of a run that "
            "`moepp train` has started"
        )
    if not (folder / CONFIG_FILE).exists():
        refuse_folder_of_runs(folder)
    config, text = read_config(folder / CONFIG_FILE)
    numbers, metrics = Numbers(config.moe), folder / METRICS_FILE
    try:
        records = read_metrics(metrics, partial(_check_fit, config, metrics), numbers.add)
    except MetricsError as error:
        raise ReportError(str(error)) from error
    alerts = folder / ALERTS_FILE
    try:
        return RunData(folder, config, text, records, numbers, read_alerts(alerts))
    except OSError as error:
        raise ReportError(
            f"{alerts}: cannot be read ({error.strerror}); make it readable, or remove it"
        ) from error


def name_below(base: Path, folder: Path) -> str:
    """A run's name among others: its folder's path below `base`, an absolute one that all share."""
    below = str(folder.relative_to(base))
    return printable(folder.name if below == "." else below, keep="")


def read_config(path: Path) -> tuple[RunConfig, str]:
    """Read a run's ``config.yaml``: the fields that the report needs, and the text.

    ReportError if it cannot be read, or is not the configuration of a run.
    """
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ReportError(
            f"{path}: cannot be read ({reason}); `moepp train` writes it into the run's folder"
        ) from error
    try:
        return RunConfig.model_validate(parse_yaml(text, str(path))), text
    except ConfigError as error:
        raise ReportError(f"{error}; restore the run's own file") from error
    except ValidationError as error:
        key, reason = first_misfit(error)
        raise ReportError(
            f"{path}: {key or 'the file'}: {reason}; restore the resolved configuration of the run"
        ) from error


def _check_fit(config: RunConfig, metrics: Path, record: StepMetrics) -> None:
    """Check that every share over experts has one entry for each expert of the configuration."""
    expected = config.moe.num_experts
    for row in (record.expert_share, *(record.layer_expert_share or ())):
        if row and len(row) != expected:
            raise ReportError(
                f"{metrics}: expert shares of step {record.step} have {len(row)} entries but "
                f"config.yaml describes {expected} experts; use the configuration that the run "
                "was made with"
            )
