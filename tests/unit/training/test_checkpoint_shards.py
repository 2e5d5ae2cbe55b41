"""A range of a flat buffer as boxes of a parameter's tensors."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moepp_megatron.training.checkpoint.optimizer import (
    _boxes,
    _ParameterShard,
    parameter_shards,
)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (1, 4), (4, 1), (2, 3, 2), (2, 1, 3, 2)])
def test_boxes_hold_every_range_in_order_and_nothing_else(shape):
    numel = math.prod(shape)
    numbers = torch.arange(numel).reshape(shape)
    for first in range(numel + 1):
        for last in range(first, numel + 1):
            found = _boxes(shape, first, last)
            held = [
                numbers[tuple(slice(b, b + n) for b, n in zip(corner, sizes, strict=True))]
                for corner, sizes in found
            ]
            flat = torch.cat([part.flatten() for part in held]) if held else torch.empty(0)
            assert flat.tolist() == list(range(first, last))
            assert len(found) <= max(1, 2 * len(shape) - 1)


def gate_and_up(key, data, rank, size):
    """As megatron-core stores the first matrix of expert 1 of 2: each half by itself."""

    def build(key, data, replica_id, flattened_range):
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                (0, 1, 2),
                (1, index * size + rank, 2 * size),
                replica_id=replica_id,
                prepend_axis_num=1,
            )
            for index, half in enumerate(data.chunk(2))
        ]

    return ShardedTensorFactory(key, data, build, torch.cat, (0, 0, 3))


def plain(key, data, rank, size):
    return ShardedTensor.from_rank_offsets(key, data, (0, rank, size), replica_id=(0, 0, 3))


@pytest.mark.parametrize("make", [plain, gate_and_up])
@pytest.mark.parametrize("cuts", [(0, 24), (0, 5, 24), (0, 11, 13, 24), (0, 12, 12, 24)])
def test_ranks_shards_make_up_the_tensor(make, cuts):
    """Two tensor-parallel ranks, whose halves data-parallel ranks have cut anywhere."""
    whole, covered = None, None
    for rank in range(2):
        parameter = torch.nn.Parameter(torch.empty(6, 4, dtype=torch.bfloat16))
        entry = make("w", parameter, rank, 2)
        values = torch.arange(24.0) + 100 * rank
        for first, last in zip(cuts, cuts[1:], strict=False):
            shard = _ParameterShard(parameter, entry, first, {})
            for part in shard.boxes("exp_avg.", values[first:last]):
                assert part.key == "exp_avg.w"
                assert part.replica_id == (0, 0, 0), "written by the rank that holds it"
                if whole is None:
                    whole, covered = torch.zeros(part.global_shape), torch.zeros(part.global_shape)
                place = tuple(
                    slice(b, b + n)
                    for b, n in zip(part.global_offset, part.local_shape, strict=True)
                )
                whole[place] = part.data
                covered[place] += 1
    # What megatron-core makes of the whole parameters.
    expected = torch.zeros(whole.shape)
    for rank in range(2):
        values = (torch.arange(24.0) + 100 * rank).view(6, 4)
        entry = make("w", values, rank, 2)
        for part in [entry] if isinstance(entry, ShardedTensor) else entry.build():
            expected[part.global_slice()] = part.data
    assert torch.equal(whole, expected)
    # Of the two experts of the factory this is one.
    assert covered.unique().tolist() == ([1] if make is plain else [0, 1])
    assert covered.sum() == 48


def test_values_that_are_read_arrive_in_the_optimizer():
    parameter = torch.nn.Parameter(torch.empty(6, 4))
    moment = torch.zeros(10)
    own = parameter.data.view(-1)[7:17]
    optimizer = SimpleNamespace(
        gbuf_ranges=[{"fp32": [{"param_map": {parameter: {"param": SimpleNamespace(start=7)}}}]}],
        model_param_group_index_map={parameter: (0, 0)},
        optimizer=SimpleNamespace(
            param_groups=[{"params": [own]}],
            state={own: {"exp_avg": moment, "step": torch.tensor(3.0)}},
        ),
    )
    (shard,) = parameter_shards(optimizer, {"model0": {"w": plain("w", parameter, 0, 1)}})
    assert sorted(shard.tensors) == ["exp_avg", "param"]
    for number, part in enumerate(shard.boxes("exp_avg.", moment), 1):
        part.data.fill_(number)
    assert moment.tolist() == [1] + 4 * [2] + 4 * [2] + [3]
