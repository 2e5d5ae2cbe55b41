"""Training with static rows: as without, in every layout that has them, and after overflow."""

import numpy as np
import pytest

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.parallel.resilience_runs import copy_as_of
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    SELECTIVE,
    STEPS,
    TP2,
    begin_training,
    compare,
    short,
)

CASES = {
    "one": (1, {}),
    "data": (2, {}),
    "tensor": (2, {"parallel": TP2}),
    "pipeline": (2, {"parallel": PP2}),
    "experts": (2, {"parallel": EP2}),
    "experts and tensor": (2, {"parallel": TP2 | EP2 | {"expert_tensor_parallel_size": 1}}),
    "experts and pipeline": (4, {"parallel": EP2 | PP2}),
    "experts of four": (
        4,
        {"parallel": {"expert_model_parallel_size": 4}, "training": {"global_batch_size": 8}},
    ),
    "full": (1, {"training": FULL}),
    "virtual": (
        2,
        {
            "model": {"num_layers": 4},
            "parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2},
        },
    ),
    "context": (2, {"parallel": CP2}),
    "further tokens": (1, {"model": {"mtp_num_layers": 1}}),
    "documents": (2, {"parallel": EP2, "data": {"reset_attention_mask": True}}),
    "shared": (2, {"parallel": EP2, "moe": {"shared_expert_ffn_hidden_size": 24}}),
    "selective": (1, {"training": SELECTIVE}),
    "capacity": (1, {"moe": {"capacity_factor": 1.0}}),
}


def runs(trained, world, sections, *factors):
    """A run with each of these values of `moe.static_rows`."""
    made = []
    for factor in factors:
        moe = sections.get("moe", {}) | {"static_rows": factor}
        made.append(trained(world, short(**sections | {"moe": moe})))
    return made


@pytest.mark.parametrize("case", CASES)
def test_static_rows_train_the_same(trained, case):
    world, sections = CASES[case]
    static, dynamic = runs(trained, world, sections, 4.0, None)
    assert static.repeated == [0] * STEPS
    assert all(0.0 < fill <= 1.0 for fill in static.fills)
    compare(static, dynamic, 1e-6)


@pytest.mark.parametrize("case", ["one", "data", "pipeline", "full", "experts"])
def test_steps_that_overflow_are_repeated_to_the_bit(trained, case):
    world, sections = CASES[case]
    noisy = sections | {"moe": {"input_jitter_eps": 0.1, "bias_update_rate": 0.0}}
    small, dynamic = runs(trained, world, noisy, 0.2, None)
    # The second step takes the other path at once.
    assert small.repeated == [1] * STEPS
    assert all(fill > 1.0 for fill in small.fills)
    assert small.losses == dynamic.losses
    assert small.grad_norms == dynamic.grad_norms
    assert small.routing == dynamic.routing
    for name, gradient in dynamic.gradients.items():
        np.testing.assert_array_equal(small.gradients[name], gradient)


@pytest.mark.parametrize("factor", [3.0, 0.9])
def test_two_and_two_steps_are_four(ranks, corpus, tmp_path, factor):
    """Resumed at step 2; the state says which path the next step takes."""
    for name in ("whole", "parts"):
        raw = trainer_settings(
            corpus,
            tmp_path / name,
            moe={"num_ffn_experts": 8, "static_rows": factor},
            training={"train_iters": 4, "log_interval": 1},
            parallel=EP2,
            checkpoint={"save_interval": 2, "load": "auto"},
        )
        ranks(2).run(run_trainer, raw)
        if name == "whole":
            copy_as_of(2, tmp_path / "whole", tmp_path / "parts")
    for key in ("loss", "grad_norm", "static_fill", "repeated_steps"):
        assert logged(tmp_path / "parts", key) == logged(tmp_path / "whole", key)
    assert (max(logged(tmp_path / "whole", "static_fill")) > 1.0) == (factor < 1.0)


def test_a_run_continues_over_a_change_of_the_setting(ranks, corpus, tmp_path):
    losses = {}
    for name, factors in {
        "without": (None, None),
        "changed": (3.0, None),
        "new": (None, 3.0),
    }.items():
        for steps, factor in zip((2, 4), factors, strict=True):
            raw = trainer_settings(
                corpus,
                tmp_path / name,
                moe={"num_ffn_experts": 8, "static_rows": factor},
                training={"train_iters": steps, "log_interval": 1},
                checkpoint={"save_interval": 2, "load": "auto"},
            )
            ranks(1).run(run_trainer, raw)
        losses[name] = logged(tmp_path / name)
    assert len(losses["without"]) == 4
    assert losses["changed"] == pytest.approx(losses["without"], rel=1e-6)
    assert losses["new"] == pytest.approx(losses["without"], rel=1e-6)


def alerts_of(raw, overflows):
    """Alerts of a part whose steps with these numbers overflow by half."""
    from types import SimpleNamespace

    import torch

    from moepp_megatron.features.static_rows.part import StaticRowsPart
    from moepp_megatron.moe.layer import moepp_layers

    config, _, model = begin_training(raw)
    part = StaticRowsPart(SimpleNamespace(config=config, model=model))
    (first, *_) = moepp_layers(model.models[0])
    alerts = []
    for number in range(1, 2200):
        part.begin_step(number, None)
        fill = 1.5 if number in overflows else 0.5
        first.statistics.fill = torch.tensor(fill, dtype=torch.float64)
        part.take_sum(part.summand())
        assert part.repeats() == (number in overflows and number - 1 not in overflows)
        alerts += [(a.step, a.text()) for a in part.end_step(SimpleNamespace(number=number))]
        part.load(part.state(), "resume", number)
    return alerts


def test_frequent_overflow_is_reported_once(ranks, on_one_rank):
    raw = short(moe={"static_rows": 1.2})
    assert ranks(1).run(alerts_of, raw, [*range(1, 100), 1500]) == [[]]
    alert, *others = on_one_rank(alerts_of, raw, [1500, 1501, 1700, 2100])
    assert others == []
    assert alert[0] == 1501
    assert "moe.static_rows (1.2) would have held them with 1.8" in alert[1]
