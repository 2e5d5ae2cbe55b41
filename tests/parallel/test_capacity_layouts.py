"""Which selections a capacity limit drops is the same however the micro-batch is shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parallel.forced_routing import places_of_this_rank
from tests.parallel.ranks import RankPools

LENGTH, SEQUENCES, EXPERTS = 16, 3, 6


def kept_by_this_rank(tp: int, cp: int, distinct: int) -> tuple[list[int], Any]:
    """Places in the sequence of this rank's tokens, and [places, sequences, E] what they keep.

    Args:
        tp: Tensor-parallel ranks.
        cp: Context-parallel ranks.
        distinct: Distinct gates: the fewer, the more ties.
    """
    import torch
    from megatron.core import parallel_state

    from moepp_megatron.moe.capacity import within_capacity
    from moepp_megatron.moe.config import MoEPPConfig

    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    generator = torch.Generator().manual_seed(distinct)
    shape = (LENGTH, SEQUENCES, EXPERTS)
    gates = torch.randint(distinct, shape, generator=generator) / distinct
    selected = torch.rand(shape, generator=generator) < 0.4
    gates = torch.where(selected, gates, 0.0)
    config = MoEPPConfig(num_ffn_experts=2, capacity_factor=0.7)
    places = places_of_this_rank(LENGTH)
    kept = within_capacity(
        gates[places].reshape(-1, EXPERTS),
        selected[places].reshape(-1, EXPERTS),
        config,
        parallel_state.get_tensor_and_context_parallel_group(),
        cp,
    )
    return places, kept.view(len(places), SEQUENCES, EXPERTS).numpy()


@pytest.mark.parametrize("distinct", [1, 3, 1000])
@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2), (1, 4), (4, 2)])
def test_the_same_selections_are_dropped(ranks: RankPools, tp: int, cp: int, distinct: int) -> None:
    ((places, expected),) = ranks(1).run(kept_by_this_rank, 1, 1, distinct)
    assert places == list(range(LENGTH))
    assert 0 < expected.sum() < expected.size
    seen = []
    for places, kept in ranks(tp * cp).run(kept_by_this_rank, tp, cp, distinct):
        np.testing.assert_array_equal(kept, expected[places])
        seen += places
    assert sorted(seen) == list(range(LENGTH))
