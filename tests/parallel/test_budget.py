"""The budget controllers in training: the same in every layout, after a restart, on other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import SyntheticDataset, begin, begin_training, settings

BATCH = 32


class ShiftedDataset(SyntheticDataset):
    """From sample `shift` on all tokens are equally likely."""

    def __init__(self, config: Any, steps: int, shift: int) -> None:
        super().__init__(config, steps)
        self._shift = shift

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        sample = super().__getitem__(index)
        if index >= self._shift:
            model = self._config.model
            generator = torch.Generator().manual_seed(index)
            tokens = torch.randint(model.vocab_size, (model.seq_length + 1,), generator=generator)
            sample |= {"tokens": tokens[:-1], "labels": tokens[1:]}
        return sample


def train(raw: dict[str, Any], steps: int, shift: int) -> tuple[list[float], list[float], Any]:
    """FFN experts per token and loss of each step, and the controller's last state."""
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.budget import BudgetControl
    from moepp_megatron.training.collect import RoutingCollector, mean_loss
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    routing = RoutingCollector(model, config, layout)
    budget = BudgetControl(config, model, routing, None)
    batches = rank_batches(ShiftedDataset(config, steps, shift), 0, config, len(model.chunks))
    taken, losses = [], []
    for step in range(1, steps + 1):
        routing.reset()
        budget.begin_step(step)
        result = training_step(model, batches, config, layout)
        budget.end_step(step)
        taken.append(float(routing.collect()["ffn_per_token"]))
        losses.append(mean_loss(result.losses))
    return taken, losses, budget.state()


def recorded_and_set_taus(raw: dict[str, Any], steps: int) -> list[tuple[float, float]]:
    """Of each step: tau in its record, and the mean tau of its forward passes."""
    from moepp_megatron.moe.layer import moepp_layers
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.budget import BudgetControl
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    routing = RoutingCollector(model, config, layout)
    budget = BudgetControl(config, model, routing, None)
    batches = rank_batches(SyntheticDataset(config, steps), 0, config, len(model.chunks))
    layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]
    pairs = []
    for step in range(1, steps + 1):
        routing.reset()
        budget.begin_step(step)
        training_step(model, batches, config, layout)
        # The last expert is a zero-computation expert.
        taus = [layer.router.balance_weights[-1].item() for layer in layers]
        budget.end_step(step)
        pairs.append((budget.metrics(step)["tau"], sum(taus) / len(taus)))
    return pairs


CONTROLLED = {
    "tau": {"budget": {"target_ffn_per_token": 0.8, "controller": "tau", "gain": 3.0}},
    "gain": {"budget": {"target_ffn_per_token": 0.8, "controller": "bias", "gain": 0.2}},
    "default": {"budget": {"target_ffn_per_token": 0.8}},
}


@pytest.mark.parametrize("controller", list(CONTROLLED))
def test_state_and_losses_are_those_of_one_process(ranks: RankPools, controller: str) -> None:
    moe = {"num_ffn_experts": 8, **CONTROLLED[controller]}
    ((taken, losses, state),) = ranks(1).run(train, settings(moe=moe), 6, 24)
    # Only the layout that spreads layers, experts and tokens over ranks at once.
    parallel = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    results = ranks(4).run(train, settings(moe=moe, parallel=parallel), 6, 24)
    for other_taken, other_losses, other_state in results:
        # fp32 sums in another order; no selection changes in six steps.
        assert other_losses == pytest.approx(losses, rel=1e-5)
        assert other_taken == taken
        assert other_state == state, "every rank knows every layer's state"


RAMP = {"target_ffn_per_token": 0.8, "start_ffn_per_token": 1.6, "ramp_steps": 4}


@pytest.mark.parametrize("controller", ["none", *CONTROLLED])
def test_the_record_holds_the_tau_of_the_step(ranks: RankPools, controller: str) -> None:
    moe = {"num_ffn_experts": 8, **CONTROLLED.get(controller, {"budget": {}})}
    moe["budget"] = moe["budget"] | RAMP
    (pairs,) = ranks(1).run(recorded_and_set_taus, settings(moe=moe), 6)
    recorded, was_set = zip(*pairs, strict=True)
    # The weights hold tau in fp32.
    assert recorded == pytest.approx(was_set, rel=1e-6)
    assert len(set(recorded)) >= 5, "nothing moves tau here"


@pytest.mark.parametrize(
    ("target", "budget", "steps", "tolerance"),
    # The default promises 5%, for any target: routers drift at a learning rate this high, and it
    # lags behind. Tau alone is 45% and 18% off here. A gain that suits a model and target holds 2%.
    [
        (0.5, {}, 100, 0.05),
        (1.0, {"controller": "bias", "gain": 0.2, "decay": 0.0}, 200, 0.02),
    ],
    ids=["default", "gain"],
)
def test_bias_holds_the_budget_through_a_shift_of_the_data(
    ranks: RankPools, target: float, budget: dict[str, Any], steps: int, tolerance: float
) -> None:
    moe = {"num_ffn_experts": 8, "budget": {"target_ffn_per_token": target, **budget}}
    training = {"train_iters": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH}
    optimizer = {"lr": 3e-3, "decay_style": "constant"}
    raw = settings(moe=moe, training=training, optimizer=optimizer)
    shift = steps * 3 // 5
    ((taken, _, _),) = ranks(1).run(train, raw, steps, shift * BATCH)

    def mean(begin: int, end: int) -> float:
        return sum(taken[begin:end]) / (end - begin)

    assert taken[0] > 1.1 * target, "an untrained router is not at the target by itself"
    # A step has 512 tokens, so single steps scatter by more.
    assert mean(steps * 2 // 5, shift) == pytest.approx(target, rel=tolerance)
    assert mean(steps * 7 // 10, steps) == pytest.approx(target, rel=tolerance)


@pytest.mark.parametrize("controller", list(CONTROLLED))
def test_five_and_five_steps_are_ten(
    ranks: RankPools, corpus: Path, tmp_path: Path, controller: str
) -> None:
    common = {"moe": {"num_ffn_experts": 8, **CONTROLLED[controller]}}
    checkpoint = {"save_interval": 5, "async_save": True, "load": "auto"}

    def run(name: str, steps: int, **sections: Any) -> None:
        sections |= {"training": {"train_iters": steps}, "optimizer": {"decay_iters": 10}}
        raw = trainer_settings(corpus, tmp_path / name, **common, **sections)
        ranks(1).run(run_trainer, raw)

    run("whole", 10)
    run("parts", 5, checkpoint=checkpoint)
    run("parts", 10, checkpoint=checkpoint)
    for name in ("loss", "ffn_per_token", "ffn_target", "tau"):
        assert logged(tmp_path / "parts", name) == logged(tmp_path / "whole", name)
    assert logged(tmp_path / "parts", "ffn_target") == [0.8 / 2] * 10


@pytest.mark.parametrize("changed", ["resumed", "weights"])
def test_a_run_begun_without_a_bias_goes_on_with_one(
    ranks: RankPools, corpus: Path, tmp_path: Path, changed: str
) -> None:
    old = {"target_ffn_per_token": 0.8, "controller": "none"}
    common: dict[str, Any] = {"training": {"train_iters": 3}, "checkpoint": {"save_interval": 3}}
    moe = {"num_ffn_experts": 8, "budget": old}
    ranks(1).run(run_trainer, trainer_settings(corpus, tmp_path / "old", moe=moe, **common))
    new = trainer_settings(
        corpus,
        tmp_path / ("old" if changed == "resumed" else "new"),
        moe={"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.8}},
        training={"train_iters": 6},
        checkpoint={
            "load": "auto" if changed == "resumed" else str(tmp_path / "old"),
            "load_optimizer": changed == "resumed",
        },
    )
    ranks(1).run(run_trainer, new)
    assert len(logged(Path(new["run"]["dir"]))) == 6


def missing_target(raw: dict[str, Any], steps: int, resumed_at: int) -> list[tuple[int, str]]:
    """Step and text of each alert while routers take what they like."""
    from moepp_megatron.training.budget import BudgetControl
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.setup import build_training_model

    config, layout = begin(raw)
    model = build_training_model(config)
    routing = RoutingCollector(model, config, layout)
    budget = BudgetControl(config, model, routing, None)
    experts = config.moe.num_experts
    found = []
    for step in range(1, steps + 1):
        if step == resumed_at:
            budget = BudgetControl(config, model, routing, budget.state())
        routing.reset()
        for statistics in routing._statistics.values():
            # As many of each expert: a share of 8 of 12.
            statistics.add_selection(torch.full((experts,), 100), 600)
        budget.begin_step(step)
        found += [(alert.step, alert.text()) for alert in budget.end_step(step)]
    return found


@pytest.mark.parametrize(
    ("budget", "remedy"),
    [
        ({"controller": "none"}, "use moe.budget.controller bias"),
        ({"controller": "tau"}, "moe.balance_coeff (0.01) is too small"),
        ({"controller": "bias", "gain": 0.01}, "moe.budget.gain (0.01)"),
    ],
)
def test_a_target_that_is_missed_is_told_once(
    ranks: RankPools, budget: dict[str, Any], remedy: str
) -> None:
    moe = {"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.8, **budget}}
    ((alert, *others),) = ranks(1).run(missing_target, settings(moe=moe), 250, 60)
    assert others == []
    # The share is 67% too large at once; its average over 20 steps is 10% too large after four.
    assert alert[0] == 103
    assert "budget_missed" in alert[1]
    assert remedy in alert[1]


def test_a_target_that_is_met_or_on_its_way_is_not_told(ranks: RankPools) -> None:
    met = {"target_ffn_per_token": 1.3, "controller": "none"}
    ramp = {"target_ffn_per_token": 0.8, "controller": "none", "start_ffn_per_token": 1.0}
    for budget in (met, ramp | {"ramp_begin": 250}):
        moe = {"num_ffn_experts": 8, "budget": budget}
        assert ranks(1).run(missing_target, settings(moe=moe), 250, 60) == [[]]
