"""Rules over numbers: when one begins, when it ends, and what a state remembers."""

import json
import math

import pytest

from moepp_megatron.features.guard.alerts import REMEDIES, _complete, effective_rules
from moepp_megatron.features.guard.settings import (
    DEFAULT_RULES,
    GUARD_METRICS,
    GuardRule,
    RoutingGuardSection,
)
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, CompleteRule, RuleJudge

LAYERS = [2, 4]
LOW = CompleteRule("low", "share", limit=0.25, is_above=False, clear=0.5, for_steps=3)
HIGH = CompleteRule("high", "loss", limit=1.0, is_above=True, clear=1.0)
NAN = math.nan


def course(rule, values):
    """Step, layer and whether it begins, of every event."""
    judge = RuleJudge([rule], LAYERS)
    return [
        (step, event.layer, event.begins)
        for step, value in enumerate(values, 1)
        for event in judge.judge({rule.metric: value})
    ]


@pytest.mark.parametrize(
    ("values", "events"),
    [
        ([0.2, 0.2, 0.2], [(3, True)]),
        # In a row.
        ([0.2, 0.2, 0.3, 0.2, 0.2], []),
        # Between the limit and `clear` it continues; its end takes as many steps.
        ([0.2] * 3 + [0.4] * 5 + [0.6] * 3, [(3, True), (11, False)]),
        ([0.2] * 3 + [0.6, 0.6, 0.4, 0.6, 0.6], [(3, True)]),
        # What was not measured is no news; nothing begins by it.
        ([0.2, NAN, 0.2], [(3, True)]),
        ([0.2, NAN, NAN, NAN], []),
        ([0.2] * 3 + [0.6] * 3 + [0.2] * 3, [(3, True), (6, False), (9, True)]),
    ],
)
def test_a_rule_holds_and_ends_after_steps_in_a_row(values, events):
    assert course(LOW, values) == [(step, WHOLE_MODEL, begins) for step, begins in events]


def test_layers_are_judged_by_themselves():
    values = [[0.2, 0.9]] * 2 + [[0.2, 0.2]] * 3
    assert course(LOW, values) == [(3, 2, True), (5, 4, True)]


def test_layers_that_are_not_measured_in_every_step_continue():
    """The steps between count, as they do for the whole model, and the event says how many."""
    judge = RuleJudge([LOW], LAYERS)
    found = [judge.judge({"share": [0.2, 0.9]} if step % 2 else {}) for step in range(1, 6)]
    ((event,),) = filter(None, found)
    assert found.index([event]) == 2
    assert (event.layer, event.begins, event.steps) == (2, True, 3)


def test_a_missing_metric_changes_nothing():
    judge = RuleJudge([HIGH], LAYERS)
    assert judge.judge({}) == []
    (event,) = judge.judge({"loss": 2.0})
    assert (event.begins, event.value, event.layer) == (True, 2.0, WHOLE_MODEL)
    assert judge.judge({"loss": 2.0}) == []


def test_a_state_continues():
    values = [[0.2, 0.9], [0.2, 0.2], [0.2, 0.2], [0.9, 0.2], [0.9, 0.2], [0.9, 0.2]]
    for cut in range(len(values)):
        judge = RuleJudge([LOW], LAYERS)
        events = [judge.judge({"share": value}) for value in values]
        parts = RuleJudge([LOW], LAYERS)
        for value in values[:cut]:
            parts.judge({"share": value})
        again = RuleJudge([LOW], LAYERS, json.loads(json.dumps(parts.state())))
        assert [again.judge({"share": value}) for value in values[cut:]] == events[cut:]
    # Of rules and layers that are there no more nothing is left.
    assert RuleJudge([HIGH], [2], judge.state()).state() == []
    assert RuleJudge([LOW], [2], judge.state()).state() == [["low", 2, False, 0]]


def test_a_reset_ends_what_had_begun():
    judge = RuleJudge([HIGH, LOW], LAYERS)
    judge.judge({"loss": 2.0, "share": [0.2, 0.2]})
    (event,) = judge.forget()
    assert (event.rule.name, event.begins) == ("high", False)
    assert judge.forget() == []
    assert judge.judge({"loss": 2.0})


def test_default_rules_are_complete_and_few():
    rules = effective_rules(RoutingGuardSection())
    assert len(rules) <= 8
    assert len({rule.name for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.metric in GUARD_METRICS
        assert rule.is_healthy(rule.clear)
        assert not rule.holds(rule.clear)
    assert {rule.name for rule in DEFAULT_RULES} == {"shift", *REMEDIES}


def test_where_a_budget_holds_the_share_no_rule_judges_it():
    names = {rule.name for rule in effective_rules(RoutingGuardSection())}
    owned = {rule.name for rule in effective_rules(RoutingGuardSection(), has_budget=True)}
    assert names - owned == {"few_ffn_experts"}


def test_a_rule_of_the_user_changes_a_default_one():
    own = GuardRule(name="few_ffn_experts", below=0.1, action="rollback")
    gone = GuardRule(name="shift", action="none")
    rules = {r.name: r for r in effective_rules(RoutingGuardSection(rules=[own, gone]))}
    assert "shift" not in rules
    few = rules["few_ffn_experts"]
    assert (few.limit, few.clear, few.for_steps, few.action) == (0.1, 0.1, 40, "rollback")
    assert _complete(own.model_copy(update={"metric": "loss"})).condition == "< 0.1"
    mine = GuardRule(name="mine", metric="loss", above=3.0)
    section = RoutingGuardSection(defaults=False, rules=[mine])
    assert [rule.name for rule in effective_rules(section)] == ["mine"]
