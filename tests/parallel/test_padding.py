"""Padding masks in every layout: training equals one process with the same padding."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.parallel.ranks import RankPools
from tests.parallel.test_expert_overlap import both
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    TP2,
    VANILLA,
    Run,
    SyntheticDataset,
    begin_training,
    compare,
    difference,
    losses_and_gradients,
    short,
    train,
)

STEPS = 2
# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5


def pad_some(models: list[Any]) -> None:
    """Give every forward pass a mask that follows from its tokens, unevenly over ranks."""
    for model in models:
        model.forward = _with_mask(model.forward)
        if hasattr(model, "build_schedule_plan"):
            model.build_schedule_plan = _with_mask(model.build_schedule_plan)


def _with_mask(function: Any) -> Any:
    def inner(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return function(input_ids, *args, padding_mask=input_ids % 5 < 2, **kwargs)

    return inner


SHARED = {"shared_expert_ffn_hidden_size": 16}
# World size, layout, and settings of the layer: its own, and those of one process too.
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dp2 ep2": (2, EP2, {}, {}),
    "dp2 ep2 dedup": (2, EP2, {"dispatcher": "alltoall_dedup"}, {}),
    "tp2 ep2": (2, TP2 | EP2, {}, SHARED),
    "tp2 ep2 allgather": (2, TP2 | EP2, {"dispatcher": "allgather"}, SHARED),
    "cp2 capacity": (2, CP2, {}, {"capacity_factor": 1.0}),
    "cp2 tp2 sequence": (
        4,
        CP2 | TP2,
        {},
        {"balance_scope": "sequence", "balance_loss": "grouped", "capacity_factor": 0.8},
    ),
    "pp2 tp2": (4, PP2 | TP2, {}, {"z_loss_coeff": 1e-2}),
}
MOE = {"num_ffn_experts": 8, "z_loss_coeff": 1e-3}


@pytest.fixture(scope="module")
def one_process(trained) -> Callable[..., Run]:
    """By the settings of its MoE layers, a padded run."""

    @functools.cache
    def run(**moe: Any) -> Run:
        return trained(1, short(moe=MOE | moe), prepare=pad_some)

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_equals_one_process(trained, one_process: Callable[..., Run], name: str) -> None:
    world, parallel, own, moe = LAYOUTS[name]
    raw = short(moe=MOE | moe | own, parallel=parallel)
    found = trained(world, raw, prepare=pad_some)
    compare(found, one_process(**moe), RELATIVE)
    if name == "dp2 ep2":
        without = trained(1, short(moe=MOE))
        assert without.losses != one_process().losses


MTP = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("world", "parallel", "moe"),
    [
        (2, TP2 | EP2, {}),
        (2, CP2, {"capacity_factor": 1.0}),
        (4, CP2 | TP2, {"balance_scope": "sequence", "capacity_factor": 0.8}),
        (4, PP2 | EP2, {"balance_scope": "sequence"}),
        (2, EP2, {"gating_residual": False}),
    ],
    ids=["tp2 ep2", "cp2 capacity", "cp2 tp2 sequence", "pp2 ep2", "no residual"],
)
def test_multi_token_prediction_equals_one_process(trained, world, parallel, moe):
    """The mask moves over the halves of a sequence that context-parallel ranks hold, too."""
    raw = short(moe=MOE | moe, model=MTP)
    one = trained(1, raw, prepare=pad_some)
    raw = short(moe=MOE | moe, model=MTP, parallel=parallel)
    compare(trained(world, raw, prepare=pad_some), one, RELATIVE)


def test_global_balance_equals_one_process_with_the_same_batches(trained) -> None:
    """One process whose micro-batches are as large as those of all data-parallel ranks."""
    moe = {"num_ffn_experts": 8, "balance_scope": "global"}
    raw = short(moe=moe, training={"micro_batch_size": 2})
    one = trained(1, raw, prepare=pad_some)
    raw = short(moe=moe, parallel=EP2, training={"micro_batch_size": 1})
    found = difference(trained(2, raw, prepare=pad_some), one)
    # The balance losses themselves are means over other micro-batches.
    assert max(found.loss, found.grad_norm, found.gradient) <= RELATIVE, found
    assert found.selections < 1e-12, found


def test_combined_schedule(ranks: RankPools) -> None:
    run, reference = both(ranks, 2, train, prepare=pad_some, parallel=EP2)
    compare(run, reference, 0.0)


KEPT = 11


def first_tokens(config: Any, is_padded: bool) -> tuple[dict[str, Any], Any]:
    """Of three sequences; the others are padding, or are not there."""
    import torch

    shape = (3, config.model.seq_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.manual_seed(5))
    length = shape[1] - 1 if is_padded else KEPT
    padding = torch.arange(length).expand(3, -1) >= KEPT
    batch = {"input_ids": tokens[:, :length].contiguous(), "attention_mask": None}
    batch["labels"] = tokens[:, 1 : length + 1].contiguous()
    return batch | {"padding_mask": padding if is_padded else None}, ~padding


@pytest.mark.parametrize("training", [{}, FULL], ids=["kept", "recomputed"])
def test_a_model_is_as_without_the_padded_tokens(ranks, training: dict[str, Any]) -> None:
    moe = {"num_ffn_experts": 8, "balance_coeff": 0.1, "z_loss_coeff": 0.1, "capacity_factor": 1.0}
    raw = short(moe=moe, training=training)
    padded, without = (
        ranks(1).run(losses_and_gradients, raw, partial(first_tokens, is_padded=is_padded))[0]
        for is_padded in (True, False)
    )
    assert padded.keys() == without.keys()
    for name, expected in without.items():
        apart = np.abs(padded[name] - expected).max()
        assert apart <= RELATIVE * np.abs(expected).max(), name
        assert expected.any(), f"{name} compares nothing"


def recorded_and_trained(raw: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Losses of a step's record, and the means over its micro-batches as training weighs them."""
    from unittest import mock

    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCounts
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    pad_some(model.models)
    collector = RoutingCounts(model, config, layout)
    collector.reset()
    batches = rank_batches(SyntheticDataset(config, 1), 0, config, 1)
    values: dict[str, list[float]] = {}
    trained: list[float] = []
    record, attach = MoEMetricsTracker.record, MoEAuxLossAutoScaler.apply

    def recording(self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        values.setdefault("z_loss" if name == "z_loss" else "balance_loss", []).append(value.item())
        record(self, name, value, *args, **kwargs)

    def attaching(activation: Any, loss: Any) -> Any:
        trained.append(loss.item())
        return attach(activation, loss)

    patches = (
        mock.patch.object(MoEMetricsTracker, "record", recording),
        mock.patch.object(MoEAuxLossAutoScaler, "apply", attaching),
    )
    with patches[0], patches[1]:
        training_step(model, batches, config, layout)
    coeffs = {"z_loss": config.moe.z_loss_coeff, "balance_loss": config.moe.balance_coeff}
    (again,) = rank_batches(SyntheticDataset(config, 1), 0, config, 1)
    tokens = sum(
        int((next(again)["tokens"] % 5 >= 2).sum()) for _ in range(layout.num_microbatches)
    )
    # A z-loss is attached to the logits before the balance loss is to the gates.
    names = [name for name, coeff in coeffs.items() if coeff]
    expected = {
        name: sum(trained[place :: len(names)]) / (coeffs[name] * tokens * config.model.num_layers)
        for place, name in enumerate(names)
    }
    found = collector.collect()
    plain = {name: sum(each) / len(each) for name, each in values.items()}
    assert all(abs(plain[name] - expected[name]) > 1e-4 for name in names), "they weigh the same"
    return {name: found[name] for name in names}, expected


@pytest.mark.parametrize(
    "moe",
    [
        {"balance_coeff": 0.1, "z_loss_coeff": 0.1},
        {"balance_coeff": 0.1, "z_loss_coeff": 0.1, "balance_scope": "sequence"},
        VANILLA | {"balance_coeff": 0.1, "z_loss_coeff": 0.1},
    ],
    ids=["microbatch", "sequence", "vanilla"],
)
def test_recorded_losses_are_the_trained_ones(ranks: RankPools, moe: dict[str, Any]) -> None:
    """Micro-batches of unequal padding weigh as much as they have tokens."""
    ((recorded, trained),) = ranks(1).run(recorded_and_trained, short(moe=moe))
    assert recorded == pytest.approx(trained, rel=RELATIVE)
