"""Routers that go wrong in training: caught, acted on, recovered from; alike on every rank."""

import json
import math
from unittest import mock

import pytest

from moepp_megatron.features.guard.settings import DEFAULT_RULES
from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.observe.metrics import read_metrics
from tests.parallel.checkpoint_runs import logged
from tests.parallel.guard_runs import Fault, guard_settings, run
from tests.parallel.resilience_runs import Fault as NumericalFault
from tests.parallel.resilience_runs import copy_as_of, run_trainer, trainer_settings
from tests.parallel.training_runs import EP2, PP2, TP2

pytestmark = pytest.mark.parallel

# World size, sections and sequences of a micro-batch: one micro-batch, but two in a pipeline.
LAYOUTS = {
    "one rank": (1, {}, 8),
    "dp2": (2, {}, 4),
    "ep2": (2, {"parallel": EP2}, 4),
    # Each rank has a part of the fp32 copies.
    "ep2 bf16": (2, {"parallel": EP2, "precision": {"dtype": "bf16"}}, 4),
    "tp2 sp": (2, {"parallel": TP2}, 8),
    "pp2": (2, {"parallel": PP2}, 4),
}
# A fault before step 3, that two steps must show.
COLLAPSE = Fault(3, "collapse", None, 2.0)
FALLEN = {
    "name": "fallen",
    "metric": "mean_ffn_to_target",
    "below": 0.25,
    "clear": 0.26,
    "for_steps": 2,
    "severity": "critical",
    "action": "put_back",
}
# Between copies of routers, where a run is to have some soon.
OFTEN = 4


def guard(*rules, **settings):
    """The section, with only these rules (defaults by their name)."""
    names = {rule["name"] for rule in rules}
    dropped = [{"name": r.name, "action": "none"} for r in DEFAULT_RULES if r.name not in names]
    return {"enabled": True, "rules": [*rules, *dropped], **settings}


def train(ranks, folder, steps, *args, layout="one rank", **named):
    """Return rank 0's findings; fail where another rank decided otherwise."""
    world_size, sections, size = LAYOUTS[layout]
    own = ("faults", "copies_every", "data")
    options = {name: named.pop(name) for name in own if name in named}
    training = {"train_iters": steps, "micro_batch_size": size, **named.pop("training", {})}
    how = named.pop("how", run)
    raw = guard_settings(folder, training=training, **sections, **named)
    found = ranks(world_size).run(how, raw, *args, **options)
    for other in found[1:]:
        assert other.decisions == found[0].decisions
        assert other.losses == found[0].losses
        assert other.wanted == found[0].wanted
    found[0].routers = {step: [other.routers[step] for other in found] for step in found[0].routers}
    return found[0]


def told(folder):
    return read_alerts(folder / "alerts.jsonl")


def records(folder):
    return list(read_metrics(folder / "metrics.jsonl"))


@pytest.mark.parametrize("layout", ["ep2 bf16", "tp2 sp", "pp2"])
def test_routers_are_put_back(ranks, tmp_path, layout):
    """To the bit, in the optimizer's copies too; alike in every layout."""
    fault = 10
    found = train(
        ranks,
        tmp_path,
        fault + 5,
        (Fault(fault, "collapse", None, 2.0),),
        layout=layout,
        copies_every=OFTEN,
        routing_guard=guard(FALLEN),
        moe={"num_ffn_experts": 8, "balance_coeff": 0.1},
    )
    assert found.decisions[0] == (fault + 1, "fallen", None, "put_back of step 8")
    assert found.routers[fault + 2] == found.routers[8] != found.routers[fault + 1]
    assert max(found.wanted[fault]) < 0.15
    for later in range(fault + 2, fault + 6):
        assert min(found.wanted[later]) > 0.5 * min(found.wanted[fault - 1]), later
    alerts = told(tmp_path)
    assert [(a.step, a.rule, a.layer, a.action) for a in alerts] == found.decisions
    assert alerts[0].severity == "critical"
    assert records(tmp_path)[-1].guard_actions == 1


def test_without_a_healthy_copy_it_is_reported(ranks, tmp_path):
    """No step behind the fault proves its routers healthy."""
    faults = (Fault(1, "collapse", None, 2.0),)
    found = train(ranks, tmp_path, 6, faults, routing_guard=guard(FALLEN))
    assert found.decisions[0] == (2, "fallen", None, "warn")


def test_copies_of_routers_are_in_checkpoints(ranks, tmp_path):
    """The fault comes after the run has been resumed, on both pipeline stages.

    So are the states of all rules and detectors: the resumed run is the same to the bit.
    """
    sections = {
        "routing_guard": guard(FALLEN, {"name": "shift"}, {"name": "router_fault"}),
        "checkpoint": {"save_interval": 5, "load": "auto"},
        "copies_every": OFTEN,
        "layout": "pp2",
    }
    faults = (Fault(6, "collapse", None, 2.0),)
    whole = train(ranks, tmp_path / "whole", 10, faults, **sections)
    copy_as_of(5, tmp_path / "whole", tmp_path / "parts")
    parts = train(ranks, tmp_path / "parts", 10, faults, **sections)
    assert parts.routers[8] == whole.routers[8] == whole.routers[4]
    assert parts.losses == {step: whole.losses[step] for step in range(6, 11)}
    assert parts.decisions == whole.decisions
    assert parts.weights == whole.weights


def test_copies_exist_where_the_guard_only_looks_on(ranks, tmp_path):
    """From the first step on, so that a run that is resumed with `safe` can use them."""
    sections = {"checkpoint": {"save_interval": 2, "load": "auto"}}
    off = train(ranks, tmp_path / "a", 2, routing_guard={"enabled": None}, **sections)
    copy_as_of(2, tmp_path / "a", tmp_path / "b")
    faults = (Fault(3, "collapse", None, 2.0),)
    rules = guard(FALLEN)
    found = train(ranks, tmp_path / "b", 5, faults, routing_guard=rules, **sections)
    assert found.decisions[0] == (4, "fallen", None, "put_back of step 1")
    assert found.routers[5] == off.routers[1]


def test_putting_routers_back_keeps_the_loss(ranks, tmp_path):
    """Against the same fault without a guard, and without the fault."""
    fault = (Fault(20, "collapse", None, 2.0),)
    checkpoint = {"save_interval": 19, "load": "auto"}
    watched = guard(FALLEN, warmup=10)
    common = {"checkpoint": checkpoint}
    healthy = train(ranks, tmp_path / "healthy", 32, routing_guard=watched, **common)
    for name in ("on", "off"):
        copy_as_of(19, tmp_path / "healthy", tmp_path / name)
    on = train(ranks, tmp_path / "on", 32, fault, routing_guard=watched, **common)
    off = train(ranks, tmp_path / "off", 32, fault, **common)

    def excess(found):
        steps = range(23, 33)
        return sum(found.losses[step] - healthy.losses[step] for step in steps) / len(steps)

    # Same data and start: what differs is the fault and what was done.
    assert excess(off) > 0.2
    assert excess(on) < 0.25 * excess(off)


EXPLODE = {"name": "logit_explosion", "above": 30.0, "for_steps": 3, "action": "rollback"}
DEAD = {
    "name": "dead",
    "metric": "min_ffn_load",
    "below": 0.01,
    "clear": 0.05,
    "for_steps": 3,
    "action": "rollback",
}


@pytest.mark.parametrize(
    ("layout", "fault", "rule", "moe"),
    [
        ("ep2", Fault(5, "explosion", 2, 50.0), EXPLODE, {}),
        ("ep2", Fault(5, "explosion", 2, 50.0), EXPLODE, {"static_rows": 1.0}),
        ("pp2", Fault(5, "dead", 1), DEAD, {}),
    ],
)
def test_rollback(ranks, tmp_path, layout, fault, rule, moe):
    """Back to before the fault, not to the newest checkpoint; bit for bit a run without it.

    Steps 5, 6 and 7 show it; checkpoints are of steps 2, 4 and, too late, 6.
    """
    common = {"observe": {"health_interval": 1}, "layout": layout, "moe": moe}
    checkpoint = {"save_interval": 2}
    rules = guard(rule)
    found = train(
        ranks, tmp_path / "a", 8, (fault,), routing_guard=rules, checkpoint=checkpoint, **common
    )
    clean = train(ranks, tmp_path / "b", 8, (), (4, 5, 6), **common)
    assert found.decisions == [(7, rule["name"], fault.layer, "rollback")]
    assert found.losses == clean.losses
    assert found.weights == clean.weights
    if moe:
        assert 0 < logged(tmp_path / "a", "repeated_steps")[-1] < 8
    (alert,) = told(tmp_path / "a")
    assert alert.condition.endswith("back to step_00000004; steps undone: 3")
    # In the file itself, not only where a reader leaves out what came twice.
    assert logged(tmp_path / "a", "step") == list(range(1, 9))
    undone = (tmp_path / "a/metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in undone] == [5, 6, 7]


def test_without_an_old_enough_checkpoint_it_is_reported(ranks, tmp_path):
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


TWO_FAULTS = {
    "faults": tuple(Fault(step, "explosion", None, 20.0) for step in (95, 99)),
    "layout": "dp2",
    "optimizer": {"lr": 3e-4},
    "routing_guard": {"enabled": True},
}


def run_with_high_loss(raw, *args, **options):
    """A run in which the loss is above its limit whenever somebody asks."""
    from moepp_megatron.observe.shift.monitor import ShiftMonitor

    with mock.patch.object(ShiftMonitor, "is_loss_high", True):
        return run(raw, *args, **options)


@pytest.mark.parametrize(
    ("how", "action"), [(run_with_high_loss, "rollback"), (run, "put_back of step 90")]
)
def test_where_routers_do_not_help_and_the_loss_is_high_it_goes_back_to_a_checkpoint(
    ranks, tmp_path, how, action
):
    """The second fault comes before the first is over; checkpoints are of step 40 and 80."""
    found = train(ranks, tmp_path, 102, checkpoint={"save_interval": 40}, how=how, **TWO_FAULTS)
    faults = [(step, action) for step, rule, _, action in found.decisions if rule == "router_fault"]
    (first, back), (second, again) = faults
    assert 95 < first <= 98
    assert back == "put_back of step 90"
    assert 99 < second <= 102
    assert again == action
    assert logged(tmp_path, "step") == list(range(1, 103))
    is_back = action == "rollback"
    for alert in [alert for alert in told(tmp_path) if alert.action == "rollback"]:
        assert f"back to step_00000080; steps undone: {second - 80}" in alert.condition
        assert (alert.cause, alert.since) == ("router", 95)
    # A run that is resumed knows how often it has gone back.
    assert found.saved["returns"] == is_back


def test_a_rollback_for_a_shift_counts_where_routers_are_put_back_as_well(ranks, tmp_path):
    rule = {"name": "loud", "metric": "logit_shift", "above": 1.0, "for_steps": 2}
    settings = TWO_FAULTS | {
        "faults": TWO_FAULTS["faults"][:1],
        "routing_guard": {"enabled": True, "rules": [rule | {"action": "rollback"}]},
    }
    found = train(ranks, tmp_path, 98, checkpoint={"save_interval": 40}, **settings)
    step = next(step for step, rule, *_ in found.decisions if rule == "router_fault")
    actions = {action for at, _, _, action in found.decisions if at == step}
    assert {"put_back of step 90", "rollback"} <= actions
    assert found.saved["returns"] == 1


def test_what_nothing_helps_against_is_accepted(ranks, tmp_path):
    """There is no checkpoint: no action is counted, and the end is no recovery."""
    found = train(ranks, tmp_path, 125, how=run_with_high_loss, **TWO_FAULTS)
    alerts = [alert for alert in told(tmp_path) if alert.rule in ("shift", "router_fault")]
    assert [a.action for a in alerts if a.rule == "router_fault"] == ["put_back of step 90", "warn"]
    assert "no checkpoint of step" in alerts[-2].condition
    assert alerts[-1].action == "accepted as usual"
    assert (alerts[-1].cause, alerts[-1].since) == ("router", alerts[0].since)
    assert records(tmp_path)[-1].guard_actions == 1
    assert len(found.losses) == 125


def test_a_rule_that_ends_late_leaves_other_faults_to_copies(ranks, tmp_path):
    """Routers that it has put back are healthy, though it ends only after six such steps."""
    loud = {"name": "loud", "metric": "logit_variance", "above": 30.0, "for_steps": 6}
    found = train(
        ranks,
        tmp_path,
        14,
        (Fault(5, "explosion", None, 50.0), Fault(13, "collapse", None, 2.0)),
        copies_every=OFTEN,
        routing_guard=guard({**loud, "action": "put_back"}, FALLEN),
        observe={"health_interval": 1},
        checkpoint={"save_interval": 2},
        moe={"num_ffn_experts": 8, "balance_coeff": 0.1},
    )
    back = [each for each in found.decisions if not each[3].startswith("end")]
    assert {each[:2] for each in back} == {(10, "loud"), (14, "fallen")}
    # Once for all layers of a step.
    assert {each[3] for each in back} == {"put_back of step 4"}
    assert found.saved["actions"] == 2


def test_a_dry_run_changes_no_bit(ranks, tmp_path):
    rules = (
        FALLEN,
        {"name": "back", "metric": "max_expert_share", "above": 0.2, "action": "rollback"},
        {"name": "end", "metric": "loss", "above": 0.1, "for_steps": 4, "action": "stop"},
    )
    off = train(ranks, tmp_path / "off", 8, (COLLAPSE,), layout="dp2")
    dry = train(
        ranks,
        tmp_path / "dry",
        8,
        (COLLAPSE,),
        layout="dp2",
        routing_guard=guard(*rules, enabled=None),
        # Were it to go back, there would be something to go back to.
        checkpoint={"save_interval": 2},
    )
    assert dry.losses == off.losses
    assert dry.weights == off.weights
    actions = {alert.action for alert in told(tmp_path / "dry")}
    assert {"put_back (dry run)", "rollback (dry run)", "stop (dry run)"} <= actions


def stopped(raw):
    """Message with which the guard ends a run on this rank."""
    from moepp_megatron.features.guard.part import GuardStopError

    with pytest.raises(GuardStopError) as error:
        run(raw)
    return str(error.value)


def test_a_rule_may_end_the_run(ranks, tmp_path):
    """The model is saved, and an alert says why."""
    rule = {"name": "end", "metric": "loss", "above": 0.1, "for_steps": 2, "action": "stop"}
    raw = guard_settings(
        tmp_path,
        training={"train_iters": 5},
        parallel=EP2,
        routing_guard=guard(rule),
        checkpoint={"save_interval": 5},
    )
    for message in ranks(2).run(stopped, raw):
        assert "rule end holds; step 2 is saved" in message
    assert [(a.step, a.rule, a.action) for a in told(tmp_path)] == [(2, "end", "stop")]
    assert (tmp_path / "checkpoints/step_00000002").is_dir()


def test_a_budget_owns_the_ffn_share(ranks, tmp_path):
    """The guard never forces the share: with all its default rules the numbers are the same."""
    moe = {"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.3}}
    alone = train(ranks, tmp_path / "a", 40, moe=moe, layout="dp2")
    both = train(ranks, tmp_path / "b", 40, moe=moe, layout="dp2", routing_guard={"enabled": True})
    assert both.losses == alone.losses
    assert both.weights == alone.weights
    assert [a.rule for a in told(tmp_path / "b") if a.metric == "mean_ffn_to_target"] == []


def test_a_shift_of_the_data(ranks, tmp_path):
    """A source breaks in step 101: reported alike on all ranks, and nothing is done about it."""
    found = train(
        ranks,
        tmp_path,
        120,
        data="broken source",
        layout="dp2",
        training={"global_batch_size": 16, "micro_batch_size": 8},
        optimizer={"lr": 3e-4},
        routing_guard={"enabled": True},
    )
    shifts = [d for d in found.decisions if d[1] in ("shift", "router_fault")]
    assert 101 <= shifts[0][0] <= 106
    assert {rule for _, rule, _, _ in shifts} == {"shift"}
    assert shifts[-1][3] == "accepted as usual"
    alerts = [alert for alert in told(tmp_path) if alert.rule == "shift"]
    assert {alert.cause for alert in alerts[-2:]} == {"data"}
    assert alerts[0].since == 101
    judged = [r for r in records(tmp_path) if r.token_shift is not None]
    assert judged[0].step == 64
    assert max(r.token_shift or 0.0 for r in judged if r.step <= 100) < 1.0


def run_with_other_numbers(raw, **options):
    """A run in which rank 1's processor comes to other numbers about shifts."""
    import torch.distributed as dist

    from moepp_megatron.observe.shift.monitor import ShiftMonitor

    original = ShiftMonitor.add

    def add(self, step, observed, **named):
        original(self, step, observed, **named)
        if self.event is not None and dist.get_rank() == 1:
            self.event.since = 20
            self._detectors["scale"].evidence = math.nan

    with mock.patch.object(ShiftMonitor, "add", add):
        return run(raw, **options)


@pytest.mark.parametrize(
    ("save_interval", "actions"),
    [
        # The only checkpoint is of the first step of the shift.
        (101, ["warn"]),
        # Other data are there after each rollback: what they are is usual after three.
        (50, ["rollback", "rollback", "rollback", "warn", "accepted as usual"]),
    ],
)
def test_a_rollback_for_a_shift_goes_to_before_its_first_step(
    ranks, tmp_path, save_interval, actions
):
    """On all ranks alike, by rank 0's numbers."""
    training = {"train_iters": 122, "global_batch_size": 16, "micro_batch_size": 8}
    raw = guard_settings(
        tmp_path,
        training=training,
        optimizer={"lr": 3e-4},
        checkpoint={"save_interval": save_interval},
        routing_guard=guard({"name": "shift", "action": "rollback"}),
    )
    zero, one = ranks(2).run(run_with_other_numbers, raw, data="broken source")
    assert zero.decisions == one.decisions
    assert zero.weights == one.weights
    alerts = [alert for alert in told(tmp_path) if alert.action != "update"]
    assert [alert.action for alert in alerts][: len(actions)] == actions
    assert zero.saved["returns"] == actions.count("rollback")
    where = {101: "no checkpoint of step 100 or before", 50: "back to step_00000100"}
    assert where[save_interval] in alerts[0].condition


def test_the_numerical_guard_may_go_back_too(ranks, tmp_path):
    """A damaged model goes back to step 2; a rule that had begun ends with it and is reported."""
    rule = {"name": "force", "metric": "loss", "above": 0.1, "for_steps": 3}
    settings = trainer_settings(
        tmp_path,
        parallel=EP2,
        routing_guard=guard(rule),
        resilience={"guard_max_consecutive_skips": 3},
        checkpoint={"save_interval": 2},
        training={"train_iters": 7},
    )
    ranks(2).run(run_trainer, settings, (), (NumericalFault("nan weight", 1, (3,)),))
    alerts = [(alert.step, alert.rule, alert.action) for alert in told(tmp_path)]
    assert alerts == [
        (3, "force", "warn"),
        *[(3, "numerical_guard", "skip_batch")] * 3,
        (3, "force", "end of warn"),
        (3, "numerical_guard", "rollback"),
        # Step 3 once more, as the first of three.
        (5, "force", "warn"),
    ]
    reasons = [a.condition for a in told(tmp_path) if a.action == "skip_batch"]
    assert "; parameter " in reasons[0]


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("spike", ["numerical_guard", "routed", "numerical_guard", "lossy"]),
        ("loss", ["numerical_guard", "numerical_guard", "routed", "lossy"]),
    ],
)
def test_refused_batches_are_judged_by_their_routing(ranks, tmp_path, kind, rules):
    """Only their routing is judged: their numbers are finite, their loss is not the model's."""
    own = (
        {"name": "routed", "metric": "mean_ffn_to_target", "above": 0.0, "for_steps": 4},
        {"name": "lossy", "metric": "loss", "above": 0.1, "for_steps": 4},
    )
    settings = trainer_settings(
        tmp_path, routing_guard=guard(*own), training={"train_iters": 5, "micro_batch_size": 8}
    )
    ranks(1).run(run_trainer, settings, (), (NumericalFault(kind, 0, (3, 4)),))
    alerts = told(tmp_path)
    assert [alert.rule for alert in alerts] == rules
    # A refused batch counts as the step that it was for.
    assert {alert.step for alert in alerts if alert.rule in ("routed", "lossy")} == {4}


def test_a_budget_holds_after_routers_were_put_back(ranks, tmp_path):
    """Its controller forgets what it has measured of the damaged ones."""
    rule = {"name": "loud", "metric": "logit_variance", "above": 100.0, "action": "put_back"}
    found = train(
        ranks,
        tmp_path,
        40,
        (Fault(30, "explosion", None, 200.0),),
        copies_every=OFTEN,
        routing_guard=guard(rule),
        observe={"health_interval": 1},
        moe={"num_ffn_experts": 8, "budget": {"target_ffn_per_token": 0.6}},
        training={"global_batch_size": 32, "micro_batch_size": 32},
        optimizer={"lr": 3e-4},
    )
    assert {(step, action) for step, *_, action in found.decisions[:2]} == {
        (30, "put_back of step 28")
    }

    worst = max(abs(share / 0.3 - 1.0) for step in range(31, 35) for share in found.wanted[step])
    assert worst < 0.25
