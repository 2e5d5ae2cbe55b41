"""The budget controllers in training: the same in every layout, after a restart, on other data."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.parallel.resilience_runs import copy_as_of
from tests.parallel.training_runs import (
    EP2,
    PP2,
    SyntheticDataset,
    begin,
    begin_training,
    settings,
    short,
)

BATCH = 32


class ShiftedDataset(SyntheticDataset):
    """From sample `shift` on all tokens are equally likely."""

    def __init__(self, config, steps, shift):
        super().__init__(config, steps)
        self._shift = shift

    def __getitem__(self, index):
        import torch

        sample = super().__getitem__(index)
        if index >= self._shift:
            model = self._config.model
            generator = torch.Generator().manual_seed(index)
            tokens = torch.randint(model.vocab_size, (model.seq_length + 1,), generator=generator)
            sample |= {"tokens": tokens[:-1], "labels": tokens[1:]}
        return sample


@dataclass
class Run:
    """The findings of one rank."""

    taken: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    recorded: list[float] = field(default_factory=list)
    was_set: list[float] = field(default_factory=list)
    state: Any = None


def train(raw, steps, shift):
    """Train with a budget on data that change with sample `shift`."""
    from moepp_megatron.features.budget.part import BudgetPart
    from moepp_megatron.moe.layer import moepp_layers
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout, model = begin_training(raw)
    routing = RoutingCountsPart(model, config, layout)
    budget = BudgetPart(config, model, routing)
    batches = rank_batches(ShiftedDataset(config, steps, shift), 0, config, len(model.chunks))
    layers = [layer for chunk in model.models for layer in moepp_layers(chunk)]
    run = Run()
    for step in range(1, steps + 1):
        routing.reset()
        budget.begin_step(step, layout)
        result = training_step(model, batches, config, layout)
        # The last expert is a zero-computation expert.
        taus = [layer.router.balance_weights[-1].item() for layer in layers]
        budget.learn(step)
        run.was_set.append(sum(taus) / len(taus))
        run.recorded.append(budget.record(SimpleNamespace(number=step), {})["tau"])
        run.taken.append(float(routing.collect()["ffn_per_token"]))
        run.losses.append(mean_loss(result.losses))
    run.state = budget.state()
    return run


CONTROLLED = {
    "tau": {"target_ffn_per_token": 0.8, "controller": "tau", "gain": 3.0},
    "gain": {"target_ffn_per_token": 0.8, "controller": "bias", "gain": 0.2},
    "default": {"target_ffn_per_token": 0.8},
}


RAMP = {"target_ffn_per_token": 0.8, "start_ffn_per_token": 1.6, "ramp_steps": 4}


@pytest.mark.parametrize("controller", ["none", *CONTROLLED])
def test_state_and_losses_are_those_of_one_process(ranks, on_one_rank, controller):
    """While the target moves, and the data change in the middle; the record holds each step's tau.

    Only the layout that spreads layers, experts and tokens over ranks at once.
    """
    budget = CONTROLLED.get(controller, {"controller": "none"}) | RAMP
    sections = {"moe": {"num_ffn_experts": 8, "budget": budget}}
    one = on_one_rank(train, short(**sections), 6, 12)
    # The weights hold tau in fp32.
    assert one.recorded == pytest.approx(one.was_set, rel=1e-6)
    assert len(set(one.recorded)) >= 5, "nothing moves tau here"
    if controller == "none":
        return
    for other in ranks(4).run(train, short(**sections, parallel=PP2 | EP2), 6, 12):
        # fp32 sums in another order; no selection changes in six steps.
        assert other.losses == pytest.approx(one.losses, rel=1e-5)
        assert other.taken == one.taken
        assert other.state == one.state, "every rank knows every layer's state"
        assert other.recorded == one.recorded


@pytest.mark.parametrize(
    ("target", "budget", "steps", "tolerance"),
    # The default promises 5%, for any target: routers drift at a learning rate this high, and it
    # lags behind. Tau alone is 45% and 18% off here. A gain that suits a model and target holds 2%.
    [(0.5, {}, 100, 0.05), (1.0, {"controller": "bias", "gain": 0.2, "decay": 0.0}, 200, 0.02)],
    ids=["default", "gain"],
)
def test_bias_holds_the_budget_through_a_shift_of_the_data(
    on_one_rank, target, budget, steps, tolerance
):
    moe = {"num_ffn_experts": 8, "budget": {"target_ffn_per_token": target, **budget}}
    training = {"train_iters": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH}
    optimizer = {"lr": 3e-3, "decay_style": "constant"}
    raw = settings(moe=moe, training=training, optimizer=optimizer, model={"num_layers": 4})
    shift = steps * 3 // 5
    run = on_one_rank(train, raw, steps, shift * BATCH)
    taken = run.taken

    def mean(begin, end):
        return sum(taken[begin:end]) / (end - begin)

    assert taken[0] > 1.1 * target, "an untrained router is not at the target by itself"
    # A step has 512 tokens, so single steps scatter by more.
    assert mean(steps * 2 // 5, shift) == pytest.approx(target, rel=tolerance)
    assert mean(steps * 7 // 10, steps) == pytest.approx(target, rel=tolerance)


# Two micro-batches of half the batch show nothing more here.
WHOLE = {"global_batch_size": 8, "micro_batch_size": 8}


@pytest.mark.parametrize("controller", list(CONTROLLED))
def test_two_and_two_steps_are_four(ranks, corpus, tmp_path, controller):
    moe = {"num_ffn_experts": 8, "budget": CONTROLLED[controller]}
    checkpoint = {"save_interval": 2, "async_save": True, "load": "auto"}
    training = {"train_iters": 4, **WHOLE}
    for name in ("whole", "parts"):
        sections = {"moe": moe, "training": training, "checkpoint": checkpoint}
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        ranks(1).run(run_trainer, raw)
        if name == "whole":
            copy_as_of(2, tmp_path / "whole", tmp_path / "parts")
    for name in ("loss", "ffn_per_token", "ffn_target", "tau"):
        assert logged(tmp_path / "parts", name) == logged(tmp_path / "whole", name)
    assert logged(tmp_path / "parts", "ffn_target") == [0.8 / 2] * 4


def test_a_run_begun_without_a_bias_continues_with_one(ranks, corpus, tmp_path):
    """Another run from its weights, and then the run itself."""

    def run(name, steps, budget, **checkpoint):
        raw = trainer_settings(
            corpus,
            tmp_path / name,
            moe={"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.8, **budget}},
            training={"train_iters": steps, **WHOLE},
            optimizer={"warmup_iters": 0},
            checkpoint=checkpoint,
        )
        ranks(1).run(run_trainer, raw)
        return len(logged(tmp_path / name))

    run("old", 1, {"controller": "none"}, save_interval=1)
    assert run("new", 2, {}, load=str(tmp_path / "old"), load_optimizer=False) == 2
    assert run("old", 2, {}, load="auto") == 2


def missing_target(raw, steps, resumed_at):
    """Step and text of each alert while routers take what they like."""
    from moepp_megatron.features.budget.part import BudgetPart
    from moepp_megatron.moe.layer import moe_statistics
    from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
    from moepp_megatron.training.setup import build_training_model

    config, layout = begin(raw)
    model = build_training_model(config)
    routing = RoutingCountsPart(model, config, layout)
    budget = BudgetPart(config, model, routing)
    experts = config.moe.num_experts
    found = []
    for step in range(1, steps + 1):
        if step == resumed_at:
            state, budget = budget.state(), BudgetPart(config, model, routing)
            budget.load(state, "resume", step)
        routing.reset()
        for chunk in model.chunks:
            for statistics in moe_statistics(chunk).values():
                # As many of each expert: a share of 8 of 12.
                statistics.add_selection(torch.full((experts,), 100), 600)
        budget.begin_step(step, layout)
        found += [(alert.step, alert.text()) for alert in budget.learn(step)]
    return found


@pytest.mark.parametrize(
    ("budget", "remedy"),
    [
        ({"controller": "none"}, "use moe.budget.controller bias"),
        ({"controller": "tau"}, "moe.balance_coeff (0.01) is too small"),
        ({"controller": "bias", "gain": 0.01}, "moe.budget.gain (0.01)"),
    ],
)
def test_a_target_that_is_missed_is_reported_once(on_one_rank, budget, remedy):
    moe = {"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.8, **budget}}
    alert, *others = on_one_rank(missing_target, short(moe=moe), 250, 60)
    assert others == []
    # The share is 67% too large at once; its average over 20 steps is 10% too large after four.
    assert alert[0] == 103
    assert "budget_missed" in alert[1]
    assert remedy in alert[1]


def test_a_target_that_is_met_or_on_its_way_is_not_told(ranks):
    met = {"target_ffn_per_token": 1.3, "controller": "none"}
    ramp = {"target_ffn_per_token": 0.8, "controller": "none", "start_ffn_per_token": 1.0}
    for budget in (met, ramp | {"ramp_begin": 250}):
        moe = {"num_ffn_experts": 8, "budget": budget}
        assert ranks(1).run(missing_target, short(moe=moe), 250, 60) == [[]]
