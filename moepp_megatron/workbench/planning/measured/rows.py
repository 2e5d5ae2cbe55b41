"""Rows of measured runs: their format, and what each says to the cost model.

A row is checked against the schema of the configuration, not against the trainer's rules: it may be
a dense model, or a format or layout that this trainer refuses (docs/planning.md, "Your own runs").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moepp_megatron.config import ConfigError, stage_layers
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.hardware import Hardware, load_hardware, nearest_hardware, with_changes
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.load import from_dotted, validated
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import Stages, expand_pipeline_layout, stages_of
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import FORCED_BALANCE, AssumedRouting, early
from moepp_megatron.workbench.planning.pipeline import even_stages
from moepp_megatron.workbench.planning.workload import Workload

Scope = Literal["in", "near", "out", "alt"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Beyond(_Strict):
    """Facts of a run that no key of the configuration holds."""

    gradient_bytes: Literal[2, 4] = 4
    moment_bytes: Literal[1, 2, 4] = 4
    multi_token_prediction_layers: int = Field(default=0, ge=0, le=16)
    sliding_window: int | None = Field(default=None, ge=1)
    sliding_window_every: int = Field(default=1, ge=1)
    ungated_ffn_hidden_size: int | None = Field(default=None, ge=1)
    latent_key_norm: bool = False
    schedule: Literal["dualpipe"] | None = None
    most_nodes_per_token: int | None = Field(default=None, ge=1)
    permute_fusion: bool = True
    router_padding: bool = False
    expert_bias: bool = False
    activation_clamp: bool = False
    rotation_fusion: bool = True
    tensor_overlap: bool = False


class Measured(_Strict):
    """What was measured, in one of three units of speed, and the peak of the allocator."""

    tokens_per_s_per_gpu: float | None = Field(default=None, gt=0)
    step_time_s: float | None = Field(default=None, gt=0)
    tflops_per_gpu: float | None = Field(default=None, gt=0)
    gflop_per_token: float | None = Field(default=None, gt=0)
    peak_memory_gib: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_speed(self) -> Measured:
        given = (self.tokens_per_s_per_gpu, self.step_time_s, self.tflops_per_gpu)
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of tokens_per_s_per_gpu, step_time_s, tflops_per_gpu")
        return self


class Row(_Strict):
    """One run, as a file describes it; docs/planning.md has the format."""

    # What is not known is told, because a file may hold remarks under names of its own.
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: str = Field(min_length=1)
    family: str = Field(min_length=1)
    scope: Scope = "in"
    source: str = ""
    note: str = ""
    pair: list[str] = []
    hardware: str
    hardware_overrides: dict[str, Any] = {}
    gpus: int = Field(ge=1)
    routing: Literal["forced", "learned"] | None = None
    settings: dict[str, Any]
    layers_per_stage: list[int] | None = None
    beyond: dict[str, Any] = {}
    measured: Measured = Measured()


@dataclass(frozen=True)
class Run:
    """A row in the cost model's terms.

    Attributes:
        row: The row.
        config: Its settings; valid by the schema alone.
        hardware: The GPU.
        load: The model and its batch.
        grid: The layout.
        stages: Layers by pipeline rank and chunk.
        routing: How uneven its routing is taken to be.
        unused: Keys of the row and of its `beyond` that are not known.
    """

    row: Row
    config: Config
    hardware: Hardware
    load: Workload
    grid: Grid
    stages: Stages
    routing: AssumedRouting
    unused: tuple[str, ...] = ()

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        """The measured speed; None where nothing was measured."""
        measured = self.row.measured
        if measured.step_time_s is not None:
            return self.load.batch * self.load.seq / measured.step_time_s / self.row.gpus
        if measured.tflops_per_gpu is not None:
            share = self.load.experts.ffn_share
            flop = training_flops_per_token(self.config, share)
            return 1000.0 * measured.tflops_per_gpu / (measured.gflop_per_token or flop / 1e9)
        return measured.tokens_per_s_per_gpu


def nearest_key(key: str) -> str | None:
    """The key of a row or of its `beyond` that a key which is not known may stand for."""
    known = [*Row.model_fields, *Beyond.model_fields]
    return next(iter(get_close_matches(key, known, n=1)), None)


def read_runs(path: Path) -> list[Run]:
    """The rows of a JSON or YAML file.

    Raises:
        ConfigError: If the file or a row is wrong; the message names the row and the key.
    """
    rows = _rows_of(path)
    names = Counter(row.name for row in rows)
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"{path}: name ({name}) must be unique, {count} rows have it; rename")
    return [run_of(row, str(path)) for row in rows]


def _rows_of(path: Path) -> list[Row]:
    try:
        if path.suffix == ".json":
            content = read_json(path)
        else:
            content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--measured ({path}) cannot be read: {error}; give a file of rows"
        ) from None
    if not isinstance(content, list) or not content:
        raise ConfigError(
            f"--measured ({path}) must hold a list of rows; docs/planning.md has an example"
        )
    rows = []
    for number, entry in enumerate(content, start=1):
        try:
            rows.append(Row.model_validate(entry))
        except ValidationError as error:
            raise ConfigError(_problem(f"{path}: row {number}", entry, error)) from None
    return rows


def _problem(place: str, entry: object, error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    name = entry.get("name") if isinstance(entry, Mapping) else None
    key = ".".join(str(part) for part in first["loc"]) or "the row"
    value = str(first["input"])[:60]
    return (
        f"{place}{f' ({name})' if name else ''}: {key} ({value}): {first['msg']}; "
        "see the format in docs/planning.md"
    )


def run_of(row: Row, source: str = "a row") -> Run:
    """A row in the cost model's terms.

    Raises:
        ConfigError: If its settings or its layout cannot be.
    """
    place = f"{source}: {row.name}"
    try:
        config = validated(from_dotted(row.settings), place)
        known = {key: row.beyond[key] for key in Beyond.model_fields if key in row.beyond}
        beyond = Beyond.model_validate(known)
    except ValidationError as error:
        raise ConfigError(_problem(place, None, error)) from None
    except ConfigError as error:
        raise ConfigError(
            "\n".join(f"{place}: {line}" for line in str(error).split("\n"))
        ) from None
    grid = _grid(row, config, beyond, place)
    load = Workload.from_config(config).with_facts(
        gradient_bytes=beyond.gradient_bytes,
        moment_bytes=beyond.moment_bytes,
        extra_layers=beyond.multi_token_prediction_layers,
        window=beyond.sliding_window,
        window_every=beyond.sliding_window_every,
        ungated_size=beyond.ungated_ffn_hidden_size,
        key_norm=beyond.latent_key_norm,
        most_nodes=beyond.most_nodes_per_token,
        permute_fused=beyond.permute_fusion,
        router_pads=beyond.router_padding,
        expert_bias=beyond.expert_bias,
        clamped=beyond.activation_clamp,
        rotation_fused=beyond.rotation_fusion,
        tensor_overlap=beyond.tensor_overlap,
    )
    hardware = load_hardware(nearest_hardware(row.hardware))
    routing = early(load.experts.num_ffn_experts) if row.routing == "learned" else FORCED_BALANCE
    return Run(
        row=row,
        config=config,
        hardware=with_changes(hardware, row.hardware_overrides, place),
        load=load,
        grid=grid,
        stages=_stages(row, config, grid, place),
        routing=routing,
        unused=(
            *sorted(row.model_extra or {}),
            *sorted(set(row.beyond) - set(Beyond.model_fields)),
        ),
    )


def _grid(row: Row, config: Config, beyond: Beyond, place: str) -> Grid:
    layout = config.parallel.pipeline_model_parallel_layout
    try:
        expand_pipeline_layout(layout or "")
    except ValueError as error:
        raise ConfigError(
            f"{place}: parallel.pipeline_model_parallel_layout ({layout}) {error}; "
            "write for example Ett|tt|ttL"
        ) from None
    grid = replace(
        Grid.from_config(config, row.gpus),
        is_dualpipe=beyond.schedule == "dualpipe",
    )
    dense, sparse = grid.tp * grid.cp * grid.pp, grid.ep * grid.etp * grid.pp
    for ranks, names in ((dense, "tensor, context and pipeline"), (sparse, "expert and pipeline")):
        if row.gpus % ranks:
            raise ConfigError(
                f"{place}: gpus ({row.gpus}) must be a multiple of the {names} ranks ({ranks}); "
                "correct one of them"
            )
    _check_shape(config, grid, place)
    unit = grid.micro_batch * grid.dp
    if config.training.global_batch_size % unit:
        raise ConfigError(
            f"{place}: training.global_batch_size ({config.training.global_batch_size}) must be a "
            f"multiple of micro-batch times data-parallel ranks ({unit}); correct one of them"
        )
    experts = config.moe.num_ffn_experts
    if experts % grid.ep:
        raise ConfigError(
            f"{place}: parallel.expert_model_parallel_size ({grid.ep}) must divide "
            f"moe.num_ffn_experts ({experts}); correct one of them"
        )
    return grid


def _check_shape(config: Config, grid: Grid, place: str) -> None:
    """Refuse what the model's arithmetic would stumble over."""
    model, moe = config.model, config.moe
    pattern = moe.moe_layer_pattern(model.num_layers)
    if len(pattern) != model.num_layers:
        raise ConfigError(
            f"{place}: moe.layer_freq ({len(pattern)} entries) must have one for each of "
            f"model.num_layers ({model.num_layers}); correct it"
        )
    heads = model.num_attention_heads
    if heads % grid.tp or model.hidden_size % heads and model.kv_channels is None:
        raise ConfigError(
            f"{place}: model.num_attention_heads ({heads}) must be a multiple of the tensor ranks "
            f"({grid.tp}) and divide model.hidden_size ({model.hidden_size}); correct one of them"
        )
    if grid.pp * grid.vpp > 2 * model.num_layers:
        raise ConfigError(
            f"{place}: model.num_layers ({model.num_layers}) must be enough for "
            f"{grid.pp * grid.vpp} stages; correct one of them"
        )


def _stages(row: Row, config: Config, grid: Grid, place: str) -> Stages:
    layers, stages = config.model.num_layers, grid.pp * grid.vpp
    sizes: Sequence[int] | None = row.layers_per_stage
    if sizes is None and config.parallel.pipeline_model_parallel_layout is not None:
        found = stage_layers(config)
        sizes = [len(found[stage % grid.pp][stage // grid.pp]) for stage in range(stages)]
    if sizes is None:
        return even_stages(layers, grid.pp, grid.vpp)
    if sum(sizes) != layers or len(sizes) != stages or min(sizes) < 0:
        raise ConfigError(
            f"{place}: layers_per_stage ({sum(sizes)} layers in {len(sizes)} stages) must be "
            f"{layers} layers in {stages} stages; correct it or the layout"
        )
    return stages_of(tuple(sizes), grid.pp)
