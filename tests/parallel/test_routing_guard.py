"""Routers that go wrong in training: caught, acted on, recovered from; alike on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moepp_megatron.config.guard_metrics import GUARD_METRICS, RECORDED
from moepp_megatron.config.guard_rules import DEFAULT_RULES
from moepp_megatron.observe.alerts import Alert, read_alerts
from moepp_megatron.observe.metrics import StepMetrics, read_metrics
from tests.parallel.checkpoint_runs import logged
from tests.parallel.guard_runs import Fault, Found, guard_settings, run
from tests.parallel.ranks import RankPools
from tests.parallel.resilience_runs import Fault as NumericalFault
from tests.parallel.resilience_runs import copy_as_of, run_trainer, trainer_settings
from tests.parallel.training_runs import EP2, PP2, TP2

pytestmark = pytest.mark.parallel

# World size, sections and sequences of a micro-batch: one micro-batch, but two in a pipeline.
LAYOUTS: dict[str, tuple[int, dict[str, Any], int]] = {
    "one rank": (1, {}, 8),
    "dp2": (2, {}, 4),
    "ep2": (2, {"parallel": EP2}, 4),
    # Each rank has a part of the fp32 copies.
    "ep2 bf16": (2, {"parallel": EP2, "precision": {"dtype": "bf16"}}, 4),
    "tp2 sp": (2, {"parallel": TP2}, 8),
    "pp2": (2, {"parallel": PP2}, 4),
}
# A fault before step 3; three steps show it.
COLLAPSE = Fault(3, "collapse", None, 2.0)
SAFE = {
    "name": "collapse_to_zero_computation",
    "below": 0.25,
    "for_steps": 3,
    "clear": 0.4,
    "clear_for_steps": 3,
}


CAUGHT = [(5, SAFE["name"], layer, "safe_mode") for layer in (1, 2)]


def guard(*rules: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The section, with these rules alone (defaults by their name)."""
    names = {rule["name"] for rule in rules}
    # That of classes of tokens is not there where these are not measured, as here.
    dropped = [
        {"name": rule.name, "action": "none"}
        for rule in DEFAULT_RULES
        if rule.name not in names and rule.metric != "class_ffn_to_past"
    ]
    return {"enabled": True, "rules": [*rules, *dropped], **settings}


def train(
    ranks: RankPools, folder: Path, steps: int, *args: Any, layout: str = "one rank", **named: Any
) -> Found:
    """What rank 0 saw; fails where another rank decided otherwise."""
    world_size, sections, size = LAYOUTS[layout]
    options = {name: named.pop(name) for name in ("copies_every", "data") if name in named}
    training = {"train_iters": steps, "micro_batch_size": size, **named.pop("training", {})}
    raw = guard_settings(folder, training=training, **sections, **named)
    found = ranks(world_size).run(run, raw, *args, **options)
    for other in found[1:]:
        assert other.decisions == found[0].decisions
        assert other.losses == found[0].losses
        assert other.wanted == found[0].wanted
    found[0].routers = {step: [other.routers[step] for other in found] for step in found[0].routers}
    found[0].ffn = {
        step: sum(other.ffn[step] for other in found) / world_size for step in found[0].ffn
    }
    return found[0]


def told(folder: Path) -> list[Alert]:
    return read_alerts(folder / "alerts.jsonl")


def records(folder: Path) -> list[StepMetrics]:
    return read_metrics(folder / "metrics.jsonl")


# Between copies of routers, where a run is to have some soon.
OFTEN = 4


@pytest.mark.parametrize("layout", ["ep2 bf16", "tp2 sp", "pp2"])
def test_collapse_to_zero_computation(ranks: RankPools, tmp_path: Path, layout: str) -> None:
    """FFN experts alone until the routers want them again; later there are weights to go back to.

    The first fall comes before there is a copy of the routers, the second behind one.
    """
    second = 18
    found = train(
        ranks,
        tmp_path,
        second + 6,
        (COLLAPSE, Fault(second, "collapse", None, 2.0)),
        layout=layout,
        copies_every=OFTEN,
        training={"eval_interval": 6, "eval_iters": 1},
        routing_guard=guard(SAFE),
        moe={"num_ffn_experts": 8, "balance_coeff": 0.1},
        optimizer={"lr": 6e-3},
    )
    begins = [d for d in found.decisions if d[3] == "safe_mode"]
    ends = [d for d in found.decisions if d[3] == "end of safe_mode"]
    back = [(second + 2, *what[1:]) for what in CAUGHT]
    assert begins == CAUGHT + back
    assert max(found.wanted[3]) < 0.15
    # In evaluation too, which comes after this step.
    assert found.ffn[6] == 1.0
    assert found.ffn[4] < 0.5
    last = max(step for step, *_ in ends[:2])
    assert [layer for *_, layer, _ in sorted(ends[:2], key=lambda d: d[2])] == [1, 2]
    for layer in (0, 1):
        # Of the 0.6 that tau asks for.
        assert min(found.wanted[step][layer] for step in range(last - 2, last + 1)) > 0.15
    actions = [record.guard_actions for record in records(tmp_path)]
    assert actions[4] == 0
    assert actions[5] == 2
    alerts = told(tmp_path)
    assert [(a.step, a.rule, a.layer, a.action) for a in alerts] == found.decisions
    assert (alerts[0].severity, alerts[0].metric) == ("critical", "ffn_to_target")
    assert alerts[0].value < 0.25
    # The second: nothing is switched off; to the bit, in the optimizer's copies too.
    copied = second - second % OFTEN
    assert max(found.wanted[second + 2]) < 0.15
    assert found.routers[second + 3] == found.routers[copied] != found.routers[second + 2]
    for step in range(second + 3, second + 7):
        assert min(found.wanted[step]) > 0.5 * min(found.wanted[second - 1]), step
        assert found.ffn[step] < 0.95, step
    assert ends[2:] == [(second + 5, *what[1:3], "end of safe_mode") for what in CAUGHT]
    condition = f"its weights of before step {copied} again"
    assert next(a for a in alerts if a.step == second + 2).condition.endswith(condition)


def test_a_router_that_falls_again_is_overruled(ranks: RankPools, tmp_path: Path) -> None:
    """Before safe mode has ended, so that its weights from before have not helped."""
    # Before step 12, so that there is a copy of the routers before step 10.
    faults = (Fault(12, "collapse", None, 2.0), Fault(16, "collapse", 2, 2.0))
    found = train(ranks, tmp_path, 18, faults, routing_guard=guard(SAFE))
    assert found.decisions[:2] == [(14, *what[1:]) for what in CAUGHT]
    assert found.routers[15] == found.routers[10] != found.routers[14]
    made = [found.ffn[step] for step in (15, 16, 17)]
    # All that layer 2 selects is FFN experts from step 17 on, with the same weights.
    assert made[2] > made[0] > made[1]
    assert found.ffn[17] > 0.5 * (1.0 + min(found.wanted[11]))
    assert found.wanted[17][1] < 0.15


def test_copies_of_routers_are_in_checkpoints(ranks: RankPools, tmp_path: Path) -> None:
    """The fault comes after the run has been resumed, on both pipeline stages."""
    sections: dict[str, Any] = {
        "routing_guard": guard(SAFE),
        "checkpoint": {"save_interval": 5, "load": "auto"},
        "copies_every": OFTEN,
        "layout": "pp2",
    }
    faults = (Fault(6, "collapse", None, 2.0),)
    whole = train(ranks, tmp_path / "whole", 10, faults, **sections)
    copy_as_of(5, tmp_path / "whole", tmp_path / "parts")
    parts = train(ranks, tmp_path / "parts", 10, faults, **sections)
    assert parts.routers[9] == whole.routers[9] == whole.routers[4]
    assert parts.losses == {step: whole.losses[step] for step in range(6, 11)}
    assert parts.decisions == whole.decisions
    assert parts.weights == whole.weights


def judge_balance_loss(raw: dict[str, Any]) -> None:
    """A run as if the catalogue let rules look at a further number of the record."""
    row = {"balance_loss": ""}
    with mock.patch.dict(GUARD_METRICS, row), mock.patch.dict(RECORDED, row):
        run(raw)


def test_what_the_record_has_can_be_judged(ranks: RankPools, tmp_path: Path) -> None:
    rule = {"name": "own", "metric": "balance_loss", "above": 0.0, "severity": "info"}
    raw = guard_settings(
        tmp_path, training={"train_iters": 2}, parallel=EP2, routing_guard=guard(rule)
    )
    ranks(2).run(judge_balance_loss, raw)
    (alert,) = told(tmp_path)
    assert alert.layer is None
    assert alert.value == records(tmp_path)[alert.step - 1].balance_loss > 0.0


def test_safe_mode_keeps_the_loss(ranks: RankPools, tmp_path: Path) -> None:
    """Against the same fault without a guard, and without the fault."""
    fault = (Fault(20, "collapse", None, 2.0),)
    checkpoint = {"save_interval": 19, "load": "auto"}
    healthy = train(ranks, tmp_path / "healthy", 32, checkpoint=checkpoint)
    for name in ("on", "off"):
        copy_as_of(19, tmp_path / "healthy", tmp_path / name)
    common: dict[str, Any] = {"checkpoint": checkpoint}
    on = train(ranks, tmp_path / "on", 32, fault, routing_guard=guard(SAFE), **common)
    off = train(ranks, tmp_path / "off", 32, fault, **common)

    def excess(found: Found) -> float:
        steps = range(23, 33)
        return sum(found.losses[step] - healthy.losses[step] for step in steps) / len(steps)

    # Same data and start: what differs is the fault and what was done.
    assert excess(off) > 0.2
    assert excess(on) < 0.5 * excess(off)


EXPLODE = {
    "name": "logit_explosion",
    "above": 30.0,
    "for_steps": 3,
    "action": "rollback",
}
DEAD = {"name": "dead_expert", "for_steps": 3, "action": "rollback"}


@pytest.mark.parametrize(
    ("layout", "fault", "rule"),
    [
        ("ep2", Fault(5, "explosion", 2, 50.0), EXPLODE),
        ("pp2", Fault(5, "dead", 1), DEAD),
    ],
)
def test_rollback(
    ranks: RankPools, tmp_path: Path, layout: str, fault: Fault, rule: dict[str, Any]
) -> None:
    """Back to before the fault, not to the newest checkpoint; bit for bit a run without it.

    Steps 5, 6 and 7 show it; checkpoints are of steps 2, 4 and, too late, 6.
    """
    common = {"observe": {"health_interval": 1}, "layout": layout}
    checkpoint = {"save_interval": 2}
    rules = guard(rule)
    found = train(
        ranks, tmp_path / "a", 8, (fault,), routing_guard=rules, checkpoint=checkpoint, **common
    )
    clean = train(ranks, tmp_path / "b", 8, (), (4, 5, 6), **common)
    assert found.decisions == [(7, rule["name"], fault.layer, "rollback")]
    assert found.losses == clean.losses
    assert found.weights == clean.weights
    (alert,) = told(tmp_path / "a")
    assert alert.condition.endswith("back to step_00000004")
    # In the file itself, not only where a reader leaves out what came twice.
    assert logged(tmp_path / "a", "step") == list(range(1, 9))
    undone = (tmp_path / "a" / "metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in undone] == [5, 6, 7]


def test_without_an_old_enough_checkpoint_it_is_told(ranks: RankPools, tmp_path: Path) -> None:
    found = train(
        ranks,
        tmp_path,
        5,
        (Fault(2, "explosion", 2, 50.0),),
        routing_guard=guard(EXPLODE),
        checkpoint={"save_interval": 2},
        observe={"health_interval": 1},
    )
    assert len(found.losses) == 5
    (alert,) = [alert for alert in told(tmp_path) if not alert.action.startswith("end")]
    assert (alert.step, alert.action) == (4, "warn")
    assert "no checkpoint of step 1 or before" in alert.condition


def test_a_run_is_resumed_in_the_middle_of_actions(ranks: RankPools, tmp_path: Path) -> None:
    """From a checkpoint of step 7 a run goes on as it did, to the bit, with every kind of state."""
    rules = (
        {**SAFE, "clear": 0.9, "clear_for_steps": 4},
        {"name": "few_ffn_experts", "for_steps": 2, "min_steps_between": 2},
        {"name": "force", "metric": "loss", "above": 0.1, "action": "raise_tau"},
    )
    sections: dict[str, Any] = {
        "routing_guard": guard(*rules, tau_half_life=3.0),
        "moe": {"num_ffn_experts": 8, "budget": {"controller": "tau"}},
        "checkpoint": {"save_interval": 7, "load": "auto"},
        "layout": "ep2",
    }
    whole = train(ranks, tmp_path / "whole", 14, (COLLAPSE,), **sections)
    copy_as_of(7, tmp_path / "whole", tmp_path / "parts")
    parts = train(ranks, tmp_path / "parts", 14, (COLLAPSE,), **sections)
    # Two layers in safe mode, and the model's tau raised.
    assert records(tmp_path / "whole")[7].guard_actions == 3
    assert parts.losses == {step: whole.losses[step] for step in range(8, 15)}
    assert parts.decisions == [d for d in whole.decisions if d[0] > 7]
    assert parts.weights == whole.weights
    taus = [record.tau for record in records(tmp_path / "whole")]
    assert [record.tau for record in records(tmp_path / "parts")] == taus


def test_a_dry_run_changes_no_bit(ranks: RankPools, tmp_path: Path) -> None:
    rules = (
        SAFE,
        {"name": "few_ffn_experts", "for_steps": 2, "min_steps_between": 0},
        {"name": "force", "metric": "loss", "above": 0.1, "action": "raise_tau"},
        {"name": "back", "metric": "max_expert_share", "above": 0.2, "action": "rollback"},
    )
    off = train(ranks, tmp_path / "off", 8, (COLLAPSE,), layout="dp2")
    dry = train(
        ranks,
        tmp_path / "dry",
        8,
        (COLLAPSE,),
        layout="dp2",
        routing_guard=guard(*rules, dry_run=True),
        # Were it to go back, there would be something to go back to.
        checkpoint={"save_interval": 2},
    )
    assert dry.losses == off.losses
    assert dry.weights == off.weights
    alerts = told(tmp_path / "dry")
    assert {alert.action for alert in alerts} >= {
        "safe_mode (dry run)",
        "raise_tau (dry run)",
        "rollback (dry run)",
    }
    assert all(alert.action.endswith("(dry run)") for alert in alerts)
    assert off.decisions == []
    # The same rules do act where they may.
    acting = guard(*rules[:3])
    on = train(ranks, tmp_path / "on", 8, (COLLAPSE,), routing_guard=acting, layout="dp2")
    assert on.losses != off.losses
    assert [d for d in on.decisions if d[3] == "safe_mode"][:2] == CAUGHT


@pytest.mark.parametrize("budget", [{}, {"controller": "tau", "target_ffn_per_token": 1.2}])
def test_raised_tau_multiplies_what_is_there(
    ranks: RankPools, tmp_path: Path, budget: dict[str, Any]
) -> None:
    """From the step after the decision on; it fades once the action ends."""
    rule = {
        "name": "few_ffn_experts",
        "for_steps": 1,
        "below": 0.3,
        "clear": 0.35,
        "scope": "any",
        "min_steps_between": 0,
    }
    moe = {"num_ffn_experts": 8, "balance_coeff": 0.1, "budget": budget}
    rules = guard(rule, tau_factor=3.0, tau_half_life=2.0)
    found = train(ranks, tmp_path / "on", 20, (COLLAPSE,), routing_guard=rules, moe=moe)
    on = records(tmp_path / "on")
    begins = [d for d in found.decisions if d[3] == "raise_tau"]
    assert [d[0] for d in begins[:2]] == [3, 3]
    ends = {d[2]: d[0] for d in found.decisions if d[3] == "end of raise_tau"}
    assert set(ends) == {1, 2}
    if budget:
        # Both runs are the same up to the decision, so the budget's tau of step 4 is too.
        train(ranks, tmp_path / "off", 4, (COLLAPSE,), moe=moe)
        base = records(tmp_path / "off")[3].tau
    else:
        base = 0.75
        assert on[2].tau is None
        after = on[-1].tau
        assert after is None or after < 3.0 * base
    assert on[3].tau == pytest.approx(3.0 * base)


def test_a_shift_of_the_data(ranks: RankPools, tmp_path: Path) -> None:
    """A source breaks from step 45 on."""
    shift = {"window": 2, "warmup": 20}
    rules = (
        {"name": "data_shift", "action": "raise_tau"},
        {"name": "loss_shift", "action": "raise_tau"},
    )
    found = train(
        ranks,
        tmp_path,
        52,
        data="broken source",
        layout="dp2",
        # More tokens a step, and routers that move less than the data does.
        training={"global_batch_size": 32, "micro_batch_size": 16},
        optimizer={"lr": 3e-4},
        routing_guard=guard(*rules, shift=shift),
    )
    first = found.decisions[0]
    assert 45 <= first[0] <= 49
    assert first[3] == "raise_tau"
    judged = [r for r in records(tmp_path) if r.routing_shift is not None]
    assert judged[0].step == 40
    before = [r for r in judged if r.step <= 44]
    assert max(max(r.routing_shift or 0.0, r.loss_shift or 0.0) for r in before) < 0.9
    alert = told(tmp_path)[0]
    assert alert.cause in ("data", "optimizer")
    assert alert.since is not None
    assert 43 <= alert.since <= alert.step
    assert alert.moved is not None
    assert alert.moved[0].startswith("loss ")
    assert (tmp_path / "routing_profile.json").is_file()


def test_the_numerical_guard_may_go_back_too(ranks: RankPools, tmp_path: Path) -> None:
    """A damaged model goes back to step 2; an action in force ends with it and is told."""
    rule = {"name": "force", "metric": "loss", "above": 0.1, "for_steps": 3, "action": "raise_tau"}
    settings = trainer_settings(
        tmp_path,
        parallel=EP2,
        routing_guard=guard(rule, shift={"window": 2}),
        resilience={"guard_window": 8, "guard_max_consecutive_skips": 3},
        checkpoint={"save_interval": 2},
        training={"train_iters": 7},
    )
    ranks(2).run(run_trainer, settings, (), (NumericalFault("nan weight", 1, (3,)),))
    alerts = [(alert.step, alert.rule, alert.action) for alert in told(tmp_path)]
    assert alerts == [
        (3, "force", "raise_tau"),
        *[(3, "numerical_guard", "skip_batch")] * 3,
        (3, "force", "end of raise_tau"),
        (3, "numerical_guard", "rollback"),
        # Step 3 once more, as the first of three.
        (5, "force", "raise_tau"),
    ]
    assert [record.guard_actions for record in records(tmp_path)] == [0] * 5 + [1, 1]


@pytest.mark.parametrize(("kind", "steps"), [("spike", (3, 4)), ("loss", (4, 4))])
def test_refused_batches_are_judged_by_their_routing(
    ranks: RankPools, tmp_path: Path, kind: str, steps: tuple[int, int]
) -> None:
    """Where their numbers are finite; their loss is not the model's."""
    rules = (
        {"name": "routed", "metric": "max_expert_share", "above": 0.0, "for_steps": 4},
        {"name": "lossy", "metric": "loss", "above": 0.1, "for_steps": 4},
    )
    settings = trainer_settings(
        tmp_path,
        routing_guard=guard(*({**rule, "scope": "mean"} for rule in rules)),
        resilience={"guard_window": 8},
        training={"train_iters": 5, "micro_batch_size": 8},
    )
    ranks(1).run(run_trainer, settings, (), (NumericalFault(kind, 0, (3, 4)),))
    found = [(a.rule, a.step) for a in told(tmp_path) if a.rule != "numerical_guard"]
    assert found == list(zip(("routed", "lossy"), steps, strict=True))
