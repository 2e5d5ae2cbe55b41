"""Rows of measured runs: their format, and what each says to the cost model.

A row is checked against the schema of the configuration, not against the trainer's rules: it may be
a dense model, or a format or layout that this trainer refuses (docs/planning.md, "Your own runs").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moepp_megatron.config import ConfigError, stage_layers
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.hardware import Hardware, load_hardware, with_changes
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.load import from_dotted, validated
from moepp_megatron.config.regular_file import read_text
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import Stages, expand_pipeline_layout, stages_of
from moepp_megatron.config.yaml_file import parse_yaml
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.imbalance import early
from moepp_megatron.tools.planning.pipeline import even_stages
from moepp_megatron.tools.planning.workload import LatentAttention, Workload

Scope = Literal["in", "near", "out", "alt"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Beyond(_Strict):
    """Facts of a run that no key of the configuration holds."""

    gradient_bytes: Literal[2, 4] = 4
    moment_bytes: Literal[1, 2, 4] = 4
    master_bytes: Literal[0, 2, 4] | None = None
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


class _Measured(_Strict):
    """Measured speed in one of three units, and the peak of the allocator."""

    tokens_per_s_per_gpu: float | None = Field(default=None, gt=0)
    step_time_s: float | None = Field(default=None, gt=0)
    tflops_per_gpu: float | None = Field(default=None, gt=0)
    gflop_per_token: float | None = Field(default=None, gt=0)
    peak_memory_gib: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _has_one_speed(self) -> _Measured:
        given = (self.tokens_per_s_per_gpu, self.step_time_s, self.tflops_per_gpu)
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of tokens_per_s_per_gpu, step_time_s, tflops_per_gpu")
        return self


class MeasuredRow(_Strict):
    """One run, as a file describes it; docs/planning.md has the format."""

    # Unknown keys are reported, because a file may hold remarks under other names.
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
    measured: _Measured = _Measured()


@dataclass(frozen=True)
class Run:
    """A row in the cost model's terms."""

    row: MeasuredRow
    config: Config  # its settings; valid only by the schema
    hardware: Hardware
    load: Workload
    grid: Grid
    stages: Stages  # layers by pipeline rank and chunk
    unused: tuple[str, ...] = ()  # keys of the row and of its `beyond` that are not known

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


def read_runs(path: Path) -> list[Run]:
    """The rows of a JSON or YAML file; a ConfigError names the wrong row and key."""
    rows = _rows_of(path)
    names = Counter(row.name for row in rows)
    for name, count in names.items():
        if count > 1:
            raise ConfigError(f"{path}: name ({name}) must be unique, {count} rows have it; rename")
    return [_run_of(row, str(path)) for row in rows]


def _rows_of(path: Path) -> list[MeasuredRow]:
    try:
        if path.suffix == ".json":
            content = read_json(path)
        else:
            # More than the format may have.
            content = parse_yaml(read_text(path, "--measured", 1_000_000), str(path))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--measured ({path}) cannot be read: {error}; give a file of rows"
        ) from None
    if not isinstance(content, list) or not content:
        raise ConfigError(f"--measured ({path}) must hold a list of rows; see docs/planning.md")
    rows = []
    for number, entry in enumerate(content, start=1):
        try:
            rows.append(MeasuredRow.model_validate(entry))
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


def _run_of(row: MeasuredRow, source: str = "a row") -> Run:
    """A row in the cost model's terms; ConfigError if its settings or its layout cannot be."""
    place = f"{source}: {row.name}"
    try:
        config = validated(from_dotted(row.settings), place)
        known = {key: row.beyond[key] for key in Beyond.model_fields if key in row.beyond}
        beyond = Beyond.model_validate(known)
    except ValidationError as error:
        raise ConfigError(_problem(place, None, error)) from None
    except ConfigError as error:
        lines = (f"{place}: {line}" for line in str(error).split("\n"))
        raise ConfigError("\n".join(lines)) from None
    grid = _grid(row, config, beyond, place)
    load = _with_facts(Workload.from_config(config), beyond)
    hardware = load_hardware(row.hardware)
    hardware = with_changes(hardware, row.hardware_overrides, place)
    stages = _stages(row, config, grid, place)
    learned = early(load.experts.num_ffn_experts) if row.routing == "learned" else None
    unused = sorted(row.model_extra or {}) + sorted(set(row.beyond) - set(Beyond.model_fields))
    return Run(row, config, hardware, replace(load, evenness=learned), grid, stages, tuple(unused))


def _with_facts(load: Workload, beyond: Beyond) -> Workload:
    """The same model with what no configuration says."""
    attention, moments = load.attention, 2 * beyond.moment_bytes
    if beyond.latent_key_norm and isinstance(attention, LatentAttention):
        attention = replace(attention, has_norms=True)
    numbers = replace(
        load.numbers,
        gradient_bytes=beyond.gradient_bytes,
        moments_bytes=moments,
        matrix_moments_bytes=moments,
        own_copy=beyond.master_bytes,
    )
    experts = replace(
        load.experts,
        most_nodes=beyond.most_nodes_per_token,
        permute_fused=beyond.permute_fusion,
        router_pads=beyond.router_padding,
        flex_pads=True,
        has_bias=beyond.expert_bias,
        is_clamped=beyond.activation_clamp,
    )
    return replace(
        load,
        attention=attention,
        numbers=numbers,
        extra_layers=beyond.multi_token_prediction_layers or load.extra_layers,
        causal_share=_seen_share(load.seq, beyond.sliding_window, beyond.sliding_window_every),
        # Whose kernels these runs had is not known of all of them.
        loss_fused=False,
        dense_size=beyond.ungated_ffn_hidden_size or load.dense_size,
        gated=beyond.ungated_ffn_hidden_size is None,
        rotation_fused=beyond.rotation_fusion,
        tensor_overlap=beyond.tensor_overlap,
        experts=experts,
    )


def _seen_share(seq: int, window: int | None, every: int) -> float:
    """Share of a layer's scores that are computed, over layers of which every n-th has a window."""
    seen = min(window or seq, seq)
    # The first `seen` tokens see all before them, later ones `seen`.
    windowed = seen / seq - (seen / seq) ** 2 / 2
    return windowed / every + 0.5 * (1 - 1 / every)


def _grid(row: MeasuredRow, config: Config, beyond: Beyond, place: str) -> Grid:
    layout = config.parallel.pipeline_model_parallel_layout
    try:
        expand_pipeline_layout(layout or "")
    except ValueError as error:
        raise ConfigError(
            f"{place}: parallel.pipeline_model_parallel_layout ({layout}) {error}; "
            "write for example Ett|tt|ttL"
        ) from None
    grid = Grid.from_config(config, row.gpus)
    for problem in _problems(config, grid):
        raise ConfigError(f"{place}: {problem}; correct one of them")
    return replace(grid, is_dualpipe=beyond.schedule == "dualpipe")


def _problems(config: Config, grid: Grid) -> Iterator[str]:
    """Yield errors that break the model's arithmetic."""
    model, moe, batch = config.model, config.moe, config.training.global_batch_size
    dense, sparse = grid.tp * grid.cp * grid.pp, grid.ep * grid.etp * grid.pp
    for ranks, names in ((dense, "tensor, context and pipeline"), (sparse, "expert and pipeline")):
        if grid.world % ranks:
            yield f"gpus ({grid.world}) must be a multiple of the {names} ranks ({ranks})"
    entries, layers = len(moe.moe_layer_pattern(model.num_layers)), model.num_layers
    if entries != layers:
        yield (
            f"moe.layer_freq ({entries} entries) must have one for each of model.num_layers "
            f"({layers})"
        )
    heads, hidden = model.num_attention_heads, model.hidden_size
    if heads % grid.tp or hidden % heads and model.kv_channels is None:
        yield (
            f"model.num_attention_heads ({heads}) must be a multiple of the tensor ranks "
            f"({grid.tp}) and divide model.hidden_size ({hidden})"
        )
    if (stages := grid.pp * grid.vpp) > 2 * layers:
        yield f"model.num_layers ({layers}) must be enough for {stages} stages"
    if batch % (unit := grid.micro_batch * grid.dp):
        yield (
            f"training.global_batch_size ({batch}) must be a multiple of micro-batch times "
            f"data-parallel ranks ({unit})"
        )
    if moe.num_ffn_experts % grid.ep:
        yield (
            f"parallel.expert_model_parallel_size ({grid.ep}) must divide moe.num_ffn_experts "
            f"({moe.num_ffn_experts})"
        )


def _stages(row: MeasuredRow, config: Config, grid: Grid, place: str) -> Stages:
    layers, stages = config.model.num_layers, grid.pp * grid.vpp
    sizes: Sequence[int] | None = row.layers_per_stage
    if sizes is None and config.parallel.pipeline_model_parallel_layout is not None:
        by_rank = stage_layers(config)
        sizes = [len(by_rank[stage % grid.pp][stage // grid.pp]) for stage in range(stages)]
    if sizes is None:
        return even_stages(layers, grid.pp, grid.vpp)
    if sum(sizes) != layers or len(sizes) != stages or min(sizes) < 0:
        raise ConfigError(
            f"{place}: layers_per_stage ({sum(sizes)} layers in {len(sizes)} stages) must be "
            f"{layers} layers in {stages} stages; correct it or the layout"
        )
    return stages_of(tuple(sizes), grid.pp)
