"""Builds one rank of a large run on one machine, without memory or peers, to check the plan.

Process groups come from torch's fake backend, which forms every group of a world of any size and
exchanges nothing; tensors are fake: they have shapes, no memory. The groups, the model and the
gradients' buffers are built by the code that a run executes.
"""

from dataclasses import dataclass, replace

import torch.distributed as dist

from moepp_megatron.config import Config, Layout, stage_layers
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.optional import have_transformer_engine
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.memory import memory_of
from moepp_megatron.tools.planning.workload import LatentAttention, Workload

_ATTENTION = ("tp", "cp", "dp", "pp")
_EXPERTS = ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class _BuiltParameter:
    """A parameter of the rank: its name after its model chunk's number, elements, bytes of one."""

    name: str
    numel: int
    dtype: str
    size: int
    is_expert: bool


@dataclass(frozen=True)
class _BuiltRank:
    """The contents of a rank."""

    rank: int
    groups: dict[str, list[int]]  # ranks of each process group that it is in, by name
    layers: list[list[int]]  # numbers (from 0) of the layers in each model chunk
    parameters: list[_BuiltParameter]  # all parameters of the rank
    gradient_bytes: int  # bytes of the gradients' buffers without alignment
    aligned_bytes: int  # the same with alignment
    shard: int  # elements whose optimizer state this rank keeps
    mean_shard: float  # the mean over the ranks that share them


@dataclass(frozen=True)
class _Check:
    """A quantity of the built rank and its calculated value."""

    name: str
    built: str
    expected: str
    holds: bool


def build_rank(config: Config, layout: Layout, rank: int) -> _BuiltRank:
    """Build one rank of a layout of any number of ranks, from a checked configuration."""
    assert not dist.is_initialized(), "a process can be only one rank"
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_support.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        distributed.build_groups(config, layout)
        with FakeTensorMode():
            return _build(config, rank)
    finally:
        distributed.stop()


def _build(config: Config, rank: int) -> _BuiltRank:
    from moepp_megatron.model.build import build_chunks
    from moepp_megatron.training.setup import wrap_models

    models = build_chunks(config)
    parameters = [
        _BuiltParameter(
            f"{number}.{name}",
            parameter.numel(),
            str(parameter.dtype).removeprefix("torch."),
            parameter.element_size(),
            ".mlp.experts." in name,
        )
        for number, model in enumerate(models)
        for name, parameter in model.named_parameters()
    ]
    layers = [[layer.layer_number - 1 for layer in model.decoder.layers] for model in models]
    _, chunks = wrap_models(models, config, casts=False)
    buffers = [
        buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]
    gradient = aligned = shard = 0
    mean_shard = 0.0
    for buffer in buffers:
        used = sum(parameter.numel() for parameter in buffer.param_index_map)
        size = buffer.grad_data.element_size()
        gradient += used * size
        aligned += buffer.grad_data.numel() * size
        is_sharded = config.parallel.use_distributed_optimizer
        shard += _own_shard(buffer) if is_sharded else used
        mean_shard += used / buffer.data_parallel_world_size if is_sharded else used
    return _BuiltRank(rank, _groups(), layers, parameters, gradient, aligned, shard, mean_shard)


def _own_shard(buffer: object) -> int:
    """Elements of this rank in each bucket (distrib_optimizer.py, _build_model_gbuf_range)."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    assert isinstance(buffer, _ParamAndGradBuffer), "a buffer of megatron-core"
    elements = 0
    for bucket in buffer.buckets:
        width = bucket.grad_data.numel() // buffer.data_parallel_world_size
        start = bucket.offset + dist.get_rank(buffer.data_parallel_group) * width
        for first, end, number in buffer.param_index_map.values():
            if number == bucket.bucket_id:
                elements += max(min(end, start + width) - max(first, start), 0)
    return elements


def _groups() -> dict[str, list[int]]:
    """Members of this rank's groups, as megatron-core formed them."""
    from megatron.core import parallel_state as state

    groups = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "dp cp": state.get_data_parallel_group(with_context_parallel=True),
        "tp pp": state.get_model_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "etp": state.get_expert_tensor_parallel_group(),
        "ep": state.get_expert_model_parallel_group(),
        "etp ep": state.get_expert_tensor_and_model_parallel_group(),
        "edp": state.get_expert_data_parallel_group(),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def check_rank(config: Config, layout: Layout, built: _BuiltRank) -> list[_Check]:
    """All comparisons of one rank: groups, layers, parameters, memory."""
    place = layout.coordinates(built.rank)
    checks = [_group(layout, built, name) for name in built.groups]
    expected = [list(chunk) for chunk in stage_layers(config)[place.pp]]
    checks.append(_Check("layers", str(built.layers), str(expected), built.layers == expected))
    return checks + _sizes(config, layout, built, place.pp)


def _group(layout: Layout, built: _BuiltRank, name: str) -> _Check:
    varying = tuple(name.split())
    order = _EXPERTS if varying[0] in ("etp", "ep", "edp") else _ATTENTION
    expected = layout.members(built.rank, varying, order)
    members = built.groups[name]
    # The order too: it decides which shard is whose.
    return _Check(f"group {name}", _ranks(members), _ranks(expected), members == expected)


def _ranks(ranks: list[int]) -> str:
    if len(ranks) <= 4:
        return f"{len(ranks)}: {', '.join(map(str, ranks))}"
    return f"{len(ranks)}: {ranks[0]}, {ranks[1]} .. {ranks[-1]}"


def _sizes(config: Config, layout: Layout, built: _BuiltRank, pp_rank: int) -> list[_Check]:
    load = Workload.from_config(config)
    if isinstance(load.attention, LatentAttention) and not have_transformer_engine():
        # What this machine builds; plans count Transformer Engine's modules.
        load = replace(load, attention=replace(load.attention, splits_compressions=True))
    planned = memory_of(
        load, Grid.from_config(config, layout.world_size), stage_layers(config), pp_rank
    )
    numbers = load.numbers
    dense, experts = (
        sum(parameter.numel for parameter in built.parameters if parameter.is_expert is kind)
        for kind in (False, True)
    )
    weights = sum(parameter.numel * parameter.size for parameter in built.parameters)
    exact = (
        ("parameters outside FFN experts", dense, planned.dense),
        ("parameters of FFN experts", experts, planned.experts),
        ("bytes of weights", weights, planned.weights),
        ("bytes of gradients", built.gradient_bytes, planned.gradients),
    )
    checks = [_Check(name, f"{real:,}", f"{plan:,}", real == plan) for name, real, plan in exact]
    dtypes = sorted({parameter.dtype for parameter in built.parameters})
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[numbers.dtype]
    checks.append(_Check("dtype", ", ".join(dtypes), dtype, dtypes == [dtype]))
    state = built.mean_shard * (numbers.moments_bytes + numbers.master_bytes)
    name = "bytes of optimizer state, mean of its shards"
    # The plan cuts dense and expert state to whole bytes.
    is_near = abs(state - planned.optimizer) < 2
    return [*checks, _Check(name, f"{state:,.0f}", f"{planned.optimizer:,}", is_near)]
