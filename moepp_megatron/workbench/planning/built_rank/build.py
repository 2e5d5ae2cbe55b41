"""Builds one rank of a large run on one machine, without memory or peers.

Process groups come from torch's fake backend, which forms every group of a world of any size and
exchanges nothing; tensors are fake: they have shapes, no memory. The groups, the model and the
gradients' buffers are built by the code that a run executes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.runtime import cpu_support, distributed


@dataclass(frozen=True)
class BuiltParameter:
    """A parameter of the rank.

    Attributes:
        name: Its name, prefixed with the model chunk's number.
        shape: Its shape on this rank.
        dtype: Its dtype by torch's name.
        size: Bytes of an element.
        is_expert: Whether it belongs to an FFN expert.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    is_expert: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class BuiltRank:
    """The contents of a rank.

    Attributes:
        rank: Its number.
        groups: Ranks of each process group that it is in, by name.
        layers: Numbers (from 0) of the layers in each model chunk.
        parameters: All parameters of the rank.
        gradient_bytes: Bytes of the gradients' buffers without alignment.
        aligned_bytes: The same with alignment.
        shard: Elements whose optimizer state this rank keeps.
        mean_shard: The mean over the ranks that share them.
    """

    rank: int
    groups: dict[str, list[int]]
    layers: list[list[int]]
    parameters: list[BuiltParameter]
    gradient_bytes: int
    aligned_bytes: int
    shard: int
    mean_shard: float


def build_rank(config: Config, layout: Layout, rank: int) -> BuiltRank:
    """Build one rank of a layout.

    Args:
        config: A checked configuration.
        layout: The layout, with any number of ranks.
        rank: The rank to build.
    """
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


def _build(config: Config, rank: int) -> BuiltRank:
    from moepp_megatron.model.build import build_chunks
    from moepp_megatron.training.setup import wrap_models

    models = build_chunks(config)
    parameters = [
        BuiltParameter(
            f"{number}.{name}",
            tuple(parameter.shape),
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
        if config.parallel.use_distributed_optimizer:
            shard += _own_shard(buffer)
            mean_shard += used / buffer.data_parallel_world_size
        else:
            shard += used
            mean_shard += used
    return BuiltRank(
        rank=rank,
        groups=_groups(),
        layers=layers,
        parameters=parameters,
        gradient_bytes=gradient,
        aligned_bytes=aligned,
        shard=shard,
        mean_shard=mean_shard,
    )


def _own_shard(buffer: object) -> int:
    """Elements of parameters in this rank's equal part of each bucket.

    Source: megatron/core/optimizer/distrib_optimizer.py, `_build_model_gbuf_range`.
    """
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

    assert isinstance(buffer, _ParamAndGradBuffer), "a buffer of megatron-core"
    own = 0
    for bucket in buffer.buckets:
        width = bucket.grad_data.numel() // buffer.data_parallel_world_size
        start = bucket.offset + dist.get_rank(buffer.data_parallel_group) * width
        for first, end, number in buffer.param_index_map.values():
            if number == bucket.bucket_id:
                own += max(min(end, start + width) - max(first, start), 0)
    return own


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
