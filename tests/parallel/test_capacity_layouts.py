"""A capacity limit drops the same selections however the micro-batch is shared out."""

import numpy as np
import pytest

from tests.parallel.forced_routing import places_of_this_rank

LENGTH, SEQUENCES, EXPERTS = 16, 3, 6


# Distinct gates: the fewer, the more ties.
DISTINCT = (1, 3, 1000)


def kept_by_this_rank(tp, cp):
    """Places in the sequence of this rank's tokens, and [places, sequences, E] what they keep."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    places = places_of_this_rank(LENGTH)
    return places, [_kept(places, cp, distinct) for distinct in DISTINCT]


def _kept(places, cp, distinct):
    import torch
    from megatron.core import parallel_state

    from moepp_megatron.moe.capacity import within_capacity
    from moepp_megatron.moe.config import MoEPPConfig

    generator = torch.Generator().manual_seed(distinct)
    shape = (LENGTH, SEQUENCES, EXPERTS)
    gates = torch.randint(distinct, shape, generator=generator) / distinct
    selected = torch.rand(shape, generator=generator) < 0.4
    gates = torch.where(selected, gates, 0.0)
    config = MoEPPConfig(2, capacity_factor=0.7)
    kept = within_capacity(
        gates[places].reshape(-1, EXPERTS),
        selected[places].reshape(-1, EXPERTS),
        config,
        parallel_state.get_tensor_and_context_parallel_group(),
        cp,
    )
    return kept.view(len(places), SEQUENCES, EXPERTS).numpy()


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2), (2, 2), (1, 4), (4, 1)])
def test_the_same_selections_are_dropped(ranks, on_one_rank, tp, cp):
    places, expected = on_one_rank(kept_by_this_rank, 1, 1)
    assert places == list(range(LENGTH))
    assert all(0 < each.sum() < each.size for each in expected)
    seen = []
    for places, kept in ranks(tp * cp).run(kept_by_this_rank, tp, cp):
        for own, whole, distinct in zip(kept, expected, DISTINCT, strict=True):
            np.testing.assert_array_equal(own, whole[places], err_msg=f"{distinct} gates")
        seen += places
    assert sorted(seen) == list(range(LENGTH))
