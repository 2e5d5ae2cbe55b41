"""Padding masks in every layout: training equals one process with the same padding."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.test_expert_overlap import EP2, both
from tests.parallel.training_runs import assemble, compare, difference, settings, train

STEPS = 2
# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5
MODEL = {"seq_length": 16}


def pad_some(models: list[Any]) -> None:
    """Give every forward pass a mask that follows from its tokens, unevenly over ranks."""
    for model in models:
        for name in ("forward", "build_schedule_plan"):
            setattr(model, name, _with_mask(getattr(model, name)))


def _with_mask(function: Any) -> Any:
    def inner(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return function(input_ids, *args, padding_mask=input_ids % 5 < 2, **kwargs)

    return inner


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp2 ep2": (2, EP2, {}),
    "dp2 ep2 dedup": (2, EP2, {"dispatcher": "alltoall_dedup"}),
    "tp2 ep2": (2, TP2 | EP2, {"shared_expert_ffn_hidden_size": 16}),
    "tp2 ep2 allgather": (
        2,
        TP2 | EP2,
        {"dispatcher": "allgather", "shared_expert_ffn_hidden_size": 16},
    ),
    "cp2 capacity": (2, CP2, {"capacity_factor": 1.0}),
    "cp2 tp2 sequence": (4, CP2 | TP2, {"balance_scope": "sequence", "capacity_factor": 0.8}),
    "pp2 tp2": (4, PP2 | TP2, {"z_loss_coeff": 1e-2}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_process(ranks: RankPools, name: str) -> None:
    world, parallel, moe = LAYOUTS[name]
    moe = {"num_ffn_experts": 8, "z_loss_coeff": 1e-3, **moe}
    one_process = assemble(ranks(1).run(train, settings(moe=moe), STEPS, pad_some))
    raw = settings(moe=moe, parallel=parallel)
    compare(assemble(ranks(world).run(train, raw, STEPS, pad_some)), one_process, RELATIVE)
    if name == "dp2 ep2":
        without = assemble(ranks(1).run(train, settings(moe=moe), STEPS))
        assert without.losses != one_process.losses


def test_global_balance_equals_one_process_with_the_same_batches(ranks: RankPools) -> None:
    """One process whose micro-batches are as large as those of all data-parallel ranks."""
    moe = {"num_ffn_experts": 8, "balance_scope": "global"}
    raw = settings(moe=moe, training={"micro_batch_size": 4})
    one_process = assemble(ranks(1).run(train, raw, STEPS, pad_some))
    raw = settings(moe=moe, parallel=EP2)
    found = difference(assemble(ranks(2).run(train, raw, STEPS, pad_some)), one_process)
    # The balance losses themselves are means over other micro-batches.
    assert max(found.loss, found.grad_norm, found.gradient) <= RELATIVE, found
    assert found.selections < 1e-12, found


def test_combined_schedule(ranks: RankPools) -> None:
    run, reference = both(ranks, 2, train, prepare=pad_some, parallel=EP2)
    compare(run, reference, 0.0)
