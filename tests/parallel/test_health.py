"""Router health is the same in every layout, and losses are sorted by FFN experts in each."""

import math

import pytest

from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    TP2,
    SyntheticDataset,
    begin_training,
    short,
    watching,
)


def measure(raw):
    """Fields of a measured step, of one that is not, and the measured step's loss."""
    from moepp_megatron.features.router_health.part import RouterHealthPart
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout, model = begin_training(raw)
    routing = RoutingCountsPart(model, config, layout)
    health = RouterHealthPart(config, model, routing.layer_numbers, 2)
    batches = rank_batches(SyntheticDataset(config, 2), 0, config, len(model.chunks))
    found, loss = [], math.nan
    for step in (1, 2):
        routing.reset()
        health.begin_step(step, layout)
        result = training_step(model, batches, config, layout, watching(health.see))
        found.append(health.collect())
        loss = mean_loss(result.losses)
    return found[1], found[0], loss


LAYOUTS = {
    "ep2": (2, EP2, {}),
    "pp2": (2, PP2, {}),
    "tp2 cp2": (4, TP2 | CP2, {}),
    "recompute": (1, {}, FULL),
    "gathered late": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, {}),
}
MOE = {"num_ffn_experts": 8, "balance_coeff": 0.1}


@pytest.fixture(scope="module")
def whole(ranks):
    return ranks(1).run(measure, short(moe=MOE))[0]


def test_one_process(whole):
    fields, unmeasured, loss = whole
    assert unmeasured == {}
    for values in fields["router_health"].values():
        assert len(values) == 2
        assert all(math.isfinite(value) for value in values)
    # The first MoE layer has no residual.
    assert fields["router_health"]["residual_ratio"][0] == 0.0
    assert min(fields["router_health"]["residual_ratio"][1:]) > 0.0
    for shares in fields["layer_ffn_histogram"]:
        assert sum(shares) == pytest.approx(1.0)
    by_ffn = [value for value in fields["loss_by_ffn"] if not math.isnan(value)]
    assert min(by_ffn) <= loss <= max(by_ffn)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_agree(ranks, whole, layout):
    world_size, parallel, training = LAYOUTS[layout]
    raw = short(moe=MOE, parallel=parallel, training=training)
    results = ranks(world_size).run(measure, raw)
    expected = whole[0]
    for fields, _, _ in results:
        assert fields["layer_ffn_histogram"] == expected["layer_ffn_histogram"]
        for name, values in expected["router_health"].items():
            # fp32 sums in another order, over a step that fp32 has already moved apart. What a
            # model's loss gives to the logits depends on the number of micro-batches a rank runs,
            # but not its ratio to what the balance loss gives.
            assert fields["router_health"][name] == pytest.approx(values, rel=2e-4, abs=2e-6), name
        if layout != "pp2":
            # With stages the last one sorts by its own layers only.
            assert fields["loss_by_ffn"] == pytest.approx(
                expected["loss_by_ffn"], rel=1e-5, nan_ok=True
            )
