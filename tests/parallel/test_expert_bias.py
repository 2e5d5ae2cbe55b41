"""Balancing by the selection bias (`moe.bias_update_rate`): the reference's rule in all layouts."""

import pytest

from tests.parallel.training_runs import CP2, EP2, FULL, PP2, TP2, VANILLA, begin_training, short

STEPS = 3
RATE = 0.02
MOE = {
    "score_function": "sqrtsoftplus",
    "gate_normalization": "selected",
    "selection_bias": True,
    "bias_update_rate": RATE,
    "tau": 0.75,
}
KINDS = {
    "moepp": MOE,
    "groups": MOE | {"num_groups": 4, "group_topk": 2, "router_topk": 3},
    "vanilla": MOE | VANILLA | {"score_function": "sigmoid", "gate_scale": 2.5},
}
LAYOUTS = {
    "ep2": (2, {"parallel": EP2}),
    "tp2 ep2": (2, {"parallel": TP2 | EP2}),
    "pp2": (2, {"parallel": PP2}),
    "cp2": (2, {"parallel": CP2}),
    "dp2, computed again": (2, {"training": FULL | {"global_batch_size": 4}}),
    "bf16, dp2": (2, {"precision": {"dtype": "bf16"}}),
}


def biases_of(raw):
    """Biases of this rank's layers after each step, and those that its own tokens would give."""
    import torch

    from moepp_megatron.model.megatron_config import moepp_config
    from moepp_megatron.moe.reference import moved_bias, select_experts
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.step import training_step
    from tests.parallel.training_runs import SyntheticDataset

    config, layout, model = begin_training(raw)
    routers = {
        module.layer_number: module
        for chunk in model.models
        for module in chunk.modules()
        if getattr(module, "expert_bias", None) is not None
    }
    seen = {number: [] for number in routers}
    for number, router in routers.items():
        router.register_forward_hook(lambda _, __, out, number=number: seen[number].append(out))
    batches = rank_batches(SyntheticDataset(config, STEPS), 0, config, len(model.chunks))
    moepp = moepp_config(config)
    found = {number: [] for number in routers}
    expected = {number: [] for number in routers}
    for _ in range(STEPS):
        before = {number: router.expert_bias.float().clone() for number, router in routers.items()}
        training_step(model, batches, config, layout)
        for number, router in routers.items():
            if moepp.is_vanilla:
                selected = torch.cat([out[1] for out in seen[number]])
            else:
                logits = torch.cat([out.logits.detach().flatten(0, 1) for out in seen[number]])
                _, selected, _ = select_experts(logits, moepp, before[number])
            seen[number].clear()
            found[number].append(router.expert_bias.tolist())
            expected[number].append(moved_bias(before[number], selected, moepp, RATE).tolist())
    return found, expected


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_moves_the_bias_as_the_reference(on_one_rank, kind):
    found, expected = on_one_rank(biases_of, short(moe=KINDS[kind]))
    assert found == expected
    assert len(found) == 2
    for steps in found.values():
        assert {round(abs(bias) / RATE) for bias in steps[0]} <= {0, 1}
        assert any(steps[0])
        assert steps[0] != steps[1] != steps[2]


# megatron-core's own layer counts loads in bf16 where the model is in bf16, up to 256 exactly.
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("moepp", each) for each in LAYOUTS] + [("vanilla", each) for each in ("tp2 ep2", "pp2")],
)
def test_layouts_move_it_alike(ranks, on_one_rank, layout, kind):
    world_size, sections = LAYOUTS[layout]
    alone = {name: value for name, value in sections.items() if name == "precision"}
    expected, _ = on_one_rank(biases_of, short(moe=KINDS[kind], **alone))
    found = {}
    for biases, _ in ranks(world_size).run(biases_of, short(moe=KINDS[kind], **sections)):
        for number, steps in biases.items():
            # The same on every rank that has the layer.
            assert found.setdefault(number, steps) == steps
    assert found == expected
