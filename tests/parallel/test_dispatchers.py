"""The two all-to-all dispatchers: the bytes they send, their order of work, and their agreement."""

import functools
from itertools import product

import numpy as np
import pytest

from tests.parallel.dispatch_runs import (
    HIDDEN,
    balanced_map,
    events,
    padded_to_capacity,
    routing_map,
    sent_bytes_of,
)
from tests.parallel.layer_runs import run_layer
from tests.parallel.training_runs import settings

TOKENS, FFN = 96, 8
WIDTH = {"fp32": 4, "bf16": 2}
# The layer is the second.
MODEL = {"num_layers": 2}
DISPATCHERS = ("alltoall", "alltoall_dedup")


def layer_settings(dispatcher, ep, dtype="fp32", **moe):
    return settings(
        model=MODEL,
        moe={"dispatcher": dispatcher, "num_zero_experts": 2, **moe},
        parallel={"expert_model_parallel_size": ep},
        precision={"dtype": dtype},
    )


# ---- bytes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sent(ranks):
    """Return what the ranks send, by rank and by dispatcher, selections and number format."""

    @functools.cache
    def by_rank(ep):
        variants = {
            (dispatcher, topk, dtype): layer_settings(dispatcher, ep, dtype, router_topk=topk)
            for dispatcher, topk, dtype in product(DISPATCHERS, (2, 4), WIDTH)
        }
        return ranks(ep).run(sent_bytes_of, variants, routing_map, TOKENS)

    return by_rank


@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("topk", [2, 4])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_bytes_are_those_of_the_routing(sent, dispatcher, topk, ep, dtype):
    results = [rank[dispatcher, topk, dtype] for rank in sent(ep)]
    # [from rank, token, to rank, its experts]
    maps = np.stack([result["map"] for result in results]).reshape(ep, TOKENS, ep, FFN // ep)
    selections = maps.sum(axis=(1, 3))
    copies = maps.any(axis=3).sum(axis=1)
    assert (copies < selections).any(), "no token meets two experts on a rank"
    vectors = copies if dispatcher == "alltoall_dedup" else selections
    for rank, result in enumerate(results):
        out, back = _others(vectors, rank)
        # Copies out and sums back, then their gradients the other way round.
        expected = (out + back) * HIDDEN * WIDTH[dtype]
        assert result["vectors"] == [expected, expected]
        assert result["counted"] == expected
        # Gates of 4 bytes and their gradients; deduplicated, a byte an expert of each copy too.
        gates_out, gates_back = (4 * count for count in _others(selections, rank))
        map_bytes = out * (FFN // ep) if dispatcher == "alltoall_dedup" else 0
        assert result["metadata"] == [gates_out + map_bytes, gates_back]


def _others(rows, rank):
    """Rows that a rank sends to others and that it gets from others, of [from, to] rows."""
    return rows[rank].sum() - rows[rank, rank], rows[:, rank].sum() - rows[rank, rank]


@pytest.mark.parametrize("ep", [2, 4])
def test_bytes_of_balanced_routing_are_the_formula(ranks, ep):
    """Dispatch sends T K phi D w (1 - 1/ep) from every rank, and so does combine."""
    variants = {
        **{topk: layer_settings("alltoall", ep, router_topk=topk) for topk in (1, 2)},
        "shared": layer_settings("alltoall_dedup", ep),
    }
    # Every rank is the destination of 1/ep of them, by symmetry.
    copies = TOKENS * 0.75 / FFN * (FFN + ep) * (1 - 1 / ep)
    for results in ranks(ep).run(sent_bytes_of, variants, balanced_map, TOKENS):
        for topk in (1, 2):
            formula = TOKENS * topk * 0.75 * HIDDEN * 4 * (1 - 1 / ep)
            assert results[topk]["vectors"] == [2 * formula, 2 * formula]
            assert results[topk]["counted"] == 2 * formula
        assert results["shared"]["counted"] == 2 * copies * HIDDEN * 4


# ---- results -------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "ep", "tp"), [(2, 2, 1), (4, 4, 1), (4, 2, 2)])
def test_two_selections_give_the_bits_of_the_plain_dispatcher(ranks, world, ep, tp):
    parallel = {
        "expert_model_parallel_size": ep,
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
    }
    plain, dedup = (
        ranks(world).run(
            run_layer, settings(model=MODEL, moe={"dispatcher": name}, parallel=parallel)
        )
        for name in ("alltoall", "alltoall_dedup")
    )
    _assert_same_bits(plain, dedup)


def test_many_selections_are_added_in_one_order(ranks):
    raw = layer_settings("alltoall_dedup", 2, router_topk=6)
    first, second = (ranks(2).run(run_layer, raw) for _ in range(2))
    _assert_same_bits(first, second)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_kernels_change_rounding_only(ranks, dispatcher):
    moe = {"router_topk": 4, "shared_expert_ffn_hidden_size": 16}
    plain, fused = (
        ranks(2).run(run_layer, layer_settings(dispatcher, 2, fused=fused, **moe))
        for fused in (False, True)
    )
    differs = False
    for one, other in zip(plain, fused, strict=True):
        pairs = [(one[name], other[name]) for name in ("output", "input_grad", "previous_grad")]
        pairs += [(a[-1], b[-1]) for a, b in zip(one["pieces"], other["pieces"], strict=True)]
        for expected, actual in pairs:
            # Sums of a few hundred fp32 terms, unit roundoff 6e-8.
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * abs(expected).max())
            differs |= not np.array_equal(actual, expected)
    assert differs, "the kernels did not run"


def _assert_same_bits(ones, others):
    for one, other in zip(ones, others, strict=True):
        for name in ("output", "logits", "input_grad", "previous_grad"):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        for mine, theirs in zip(one["pieces"], other["pieces"], strict=True):
            np.testing.assert_array_equal(mine[-1], theirs[-1], err_msg=mine[0])


# ---- order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_local_work_runs_while_tokens_travel(ranks, dispatcher, fused):
    raw = layer_settings(dispatcher, 2, shared_expert_ffn_hidden_size=16, fused=fused)
    is_dedup = dispatcher == "alltoall_dedup"
    num_metadata = 2 if is_dedup else 1
    dispatch = ["start metadata"] * num_metadata + ["start vectors"]
    arrive = (
        ["wait metadata"] * num_metadata + ["wait vectors"]
        if is_dedup
        else ["wait vectors", "wait metadata"]
    )
    forward = [
        *dispatch,
        "shared expert",
        *arrive,
        "experts",
        "start vectors",
        "zero-computation experts",
        "wait vectors",
        *(["combine"] if fused else []),
    ]
    for log in ranks(2).run(events, raw):
        border = log.index("backward")
        assert log[:border] == forward
        backward = log[border + 1 :]
        # The map has no gradient, so two exchanges remain of dispatch whatever the dispatcher.
        assert backward[:4] == [
            "start vectors",
            "zero-computation experts",
            "wait vectors",
            "experts",
        ]
        assert sorted(backward[4:6]) == ["start metadata", "start vectors"]
        assert backward[6] == "shared expert"
        assert sorted(backward[7:]) == ["wait metadata", "wait vectors"]


# ---- in megatron-core's own layer -----------------------------------------------------------


@pytest.mark.parallel
def test_batches_padded_to_a_capacity_travel_as_with_megatrons_dispatcher(ranks):
    ours, theirs = (ranks(2).run(padded_to_capacity, name) for name in ("ours", "upstream"))
    for mine, other in zip(ours, theirs, strict=True):
        for name, values in other.items():
            assert np.abs(values).max() > 0, name
            # The same rows in the same order: the same bits.
            assert np.array_equal(mine[name], values), name
