"""Padding masks: what a model computes of padded batches, and what is recorded of them."""

from functools import partial

import numpy as np
import pytest

from tests.parallel.forced_routing import pad_some
from tests.parallel.training_runs import (
    EP2,
    FULL,
    VANILLA,
    SyntheticDataset,
    begin_training,
    difference,
    losses_and_gradients,
    short,
)

STEPS = 2
# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5


def test_global_balance_equals_one_process_with_the_same_batches(trained):
    """One process whose micro-batches are as large as those of all data-parallel ranks."""
    moe = {"num_ffn_experts": 8, "balance_scope": "global"}
    raw = short(moe=moe, training={"micro_batch_size": 2})
    one = trained(1, raw, STEPS, pad_some)
    raw = short(moe=moe, parallel=EP2, training={"micro_batch_size": 1})
    found = difference(trained(2, raw, STEPS, pad_some), one)
    # The balance losses themselves are means over other micro-batches.
    assert max(found.loss, found.grad_norm, found.gradient) <= RELATIVE, found
    assert found.selections < 1e-12, found


KEPT = 11


def first_tokens(config, is_padded):
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
def test_a_model_is_as_without_the_padded_tokens(ranks, training):
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


def recorded_and_trained(raw):
    """Losses of a step's record, and the means over its micro-batches as training weighs them."""
    from unittest import mock

    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    pad_some(model.models)
    collector = RoutingCountsPart(model, config, layout)
    collector.reset()
    batches = rank_batches(SyntheticDataset(config, 1), 0, config, 1)
    values = {}
    trained = []
    record, attach = MoEMetricsTracker.record, MoEAuxLossAutoScaler.apply

    def recording(self, name, value, *args, **kwargs):
        values.setdefault("z_loss" if name == "z_loss" else "balance_loss", []).append(value.item())
        record(self, name, value, *args, **kwargs)

    def attaching(activation, loss):
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
def test_recorded_losses_are_the_trained_ones(on_one_rank, moe):
    """Micro-batches of unequal padding weigh as much as they have tokens."""
    recorded, trained = on_one_rank(recorded_and_trained, short(moe=moe))
    assert recorded == pytest.approx(trained, rel=RELATIVE)
