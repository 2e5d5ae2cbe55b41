"""Builds ranks of large layouts on one machine, without memory or peers, to check the plan.

Process groups come from torch's fake backend, which forms every group of a world of any size and
exchanges nothing; tensors are fake: they have shapes, no memory. Each layout is built in a process
of its own: a process has one set of groups at a time.
"""

from dataclasses import dataclass, replace

from moepp_megatron.config import Layout, parse_config, stage_layers
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.memory import _memory_of
from moepp_megatron.tools.planning.workload import LatentAttention, Workload

WORLD = 1024
# Coordinates of the whole grid of attention, and of the experts.
ATTENTION, EXPERTS = ("tp", "cp", "dp", "pp"), ("etp", "ep", "edp", "pp")


@dataclass(frozen=True)
class BuiltRank:
    """The contents of a rank."""

    groups: dict[str, list[int]]  # ranks of each process group that it is in, by name
    layers: list[list[int]]  # numbers (from 0) of the layers in each model chunk
    dense: int  # parameters outside FFN experts
    experts: int
    weights: int  # bytes
    dtypes: set[str]
    gradients: int  # bytes of the gradients' buffers without alignment
    aligned: int  # the same with alignment
    shard: int  # elements whose optimizer state this rank keeps
    mean_shard: float  # the mean over the ranks that share them


class SplitCompressions(LatentAttention):
    """Compressions are split over the ranks, as megatron-core's local modules do it."""

    def _compression(self, width, hidden, tp):
        return replace(super()._compression(width // tp, hidden, tp), is_sequence_parallel=False)


def build(raw, ranks):
    """Each rank as built, and its `differences`."""
    config = parse_config(raw)
    layout = Layout.from_config(config, WORLD)
    built = [_build_rank(config, layout, rank) for rank in ranks]
    return [(one, differences(config, layout, r, one)) for r, one in zip(ranks, built, strict=True)]


def _build_rank(config, layout, rank):
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moepp_megatron.model.build import _build_chunks
    from moepp_megatron.runtime import cpu_support, distributed
    from moepp_megatron.training.setup import _wrap_models

    cpu_support.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        distributed.build_groups(config, layout)
        with FakeTensorMode():
            models = _build_chunks(config)
            named = [pair for model in models for pair in model.named_parameters()]
            layers = [[each.layer_number - 1 for each in m.decoder.layers] for m in models]
            _, chunks = _wrap_models(models, config, casts=False)
            buffers = [b for c in chunks for b in c.buffers + c.expert_parallel_buffers]
            return BuiltRank(
                _groups(),
                layers,
                sum(p.numel() for name, p in named if ".mlp.experts." not in name),
                sum(p.numel() for name, p in named if ".mlp.experts." in name),
                sum(p.numel() * p.element_size() for _, p in named),
                {str(p.dtype).removeprefix("torch.") for _, p in named},
                sum(_used(b) * b.grad_data.element_size() for b in buffers),
                sum(b.grad_data.nbytes for b in buffers),
                *_shards(buffers, config.parallel.use_distributed_optimizer),
            )
    finally:
        distributed.stop()


def _used(buffer):
    return sum(parameter.numel() for parameter in buffer.param_index_map)


def _shards(buffers, is_sharded):
    if not is_sharded:
        return (sum(map(_used, buffers)),) * 2
    means = (_used(buffer) / buffer.data_parallel_world_size for buffer in buffers)
    return sum(map(_own_shard, buffers)), sum(means)


def _own_shard(buffer):
    """Elements of this rank in each bucket (distrib_optimizer.py, _build_model_gbuf_range)."""
    import torch.distributed as dist

    elements = 0
    for bucket in buffer.buckets:
        width = bucket.grad_data.numel() // buffer.data_parallel_world_size
        start = bucket.offset + dist.get_rank(buffer.data_parallel_group) * width
        for first, end, number in buffer.param_index_map.values():
            if number == bucket.bucket_id:
                elements += max(min(end, start + width) - max(first, start), 0)
    return elements


def _groups():
    """Members of this rank's groups, as megatron-core formed them."""
    import torch.distributed as dist
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


def _members(layout, rank, varying):
    """Ranks of the group of `rank` in which only these coordinates differ."""
    whole = EXPERTS if varying[0] in ("etp", "ep", "edp") else ATTENTION
    own = layout.coordinates(rank)
    fixed = [name for name in whole if name not in varying]
    return [
        place.rank
        for place in map(layout.coordinates, range(layout.world_size))
        if all(getattr(place, name) == getattr(own, name) for name in fixed)
    ]


def differences(config, layout, rank, built):
    """Return the differences from the layout and the plan, by name: built, expected."""
    from moepp_megatron.runtime.optional import have_transformer_engine

    load, stage = Workload.from_config(config), layout.coordinates(rank).pp
    if isinstance(load.attention, LatentAttention) and not have_transformer_engine():
        # What this machine builds; plans count Transformer Engine's modules.
        load = replace(load, attention=SplitCompressions(**vars(load.attention)))
    grid, stages = Grid.from_config(config, layout.world_size), stage_layers(config)
    planned, numbers = _memory_of(load, grid, stages, stage), load.numbers
    # The plan cuts dense and expert state to whole bytes.
    state = built.mean_shard * (numbers.moments_bytes + numbers.master_bytes)
    near = planned.optimizer if abs(state - planned.optimizer) < 2 else state
    pairs = {
        # The order too: it decides which shard is whose.
        **{n: (has, _members(layout, rank, n.split())) for n, has in built.groups.items()},
        "layers": (built.layers, [list(chunk) for chunk in stages[stage]]),
        "parameters outside FFN experts": (built.dense, planned.dense),
        "parameters of FFN experts": (built.experts, planned.experts),
        "bytes of weights": (built.weights, planned.weights),
        "bytes of gradients": (built.gradients, planned.gradients),
        "dtypes": (built.dtypes, {{"bf16": "bfloat16", "fp32": "float32"}[numbers.dtype]}),
        "bytes of optimizer state, mean of its shards": (near, planned.optimizer),
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
