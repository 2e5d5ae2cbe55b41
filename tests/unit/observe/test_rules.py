"""The rules' states: durations, hysteresis, rate limits, places, resuming."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from moepp_megatron.config.guard_metrics import GUARD_METRICS
from moepp_megatron.config.guard_rules import DEFAULT_RULES, CompleteRule, complete, effective_rules
from moepp_megatron.config.schema import GuardRule, RoutingGuardSection
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, RuleJudge

LOW = CompleteRule(
    name="low",
    metric="ffn_fraction",
    limit=0.2,
    is_above=False,
    clear=0.4,
    for_steps=3,
    clear_for_steps=2,
    action="safe_mode",
)


def judged(judge: RuleJudge, values: list[Any], metric: str = "ffn_fraction") -> list[str]:
    """What happens at each step: + for a beginning, - for an end."""
    found = []
    for value in values:
        events = judge.judge({} if value is None else {metric: value})
        found.append("".join("+" if event.begins else "-" for event in events) or ".")
    return found


def test_an_action_begins_after_its_duration_and_ends_after_the_other() -> None:
    judge = RuleJudge([LOW], [1])
    assert judged(judge, [[0.1], [0.1], [0.1], [0.1]]) == [".", ".", "+", "."]
    assert judge.places("safe_mode") == {1}
    assert judged(judge, [[0.5], [0.5]]) == [".", "-"]
    assert judge.places("safe_mode") == set()


def test_a_step_that_does_not_hold_starts_the_count_anew() -> None:
    steps = [[0.1], [0.1], [0.2], [0.1], [0.1], [0.1]]
    assert judged(RuleJudge([LOW], [1]), steps) == [".", ".", ".", ".", ".", "+"]


def test_a_rule_over_a_share_of_steps_counts_what_flickers() -> None:
    rule = replace(LOW, of_steps=5)
    low, high = [0.1], [0.5]
    flickers = [low, high, low, high, low]
    assert judged(RuleJudge([rule], [1]), flickers) == [*"....", "+"]
    assert judged(RuleJudge([LOW], [1]), flickers) == ["."] * 5
    # The first of three is forgotten after five steps.
    assert judged(RuleJudge([rule], [1]), [low, high, high, low, high, low]) == ["."] * 6
    assert rule.condition == "< 0.2 for 3 of 5 steps"
    (event,) = [
        event
        for judge in [RuleJudge([rule], [1])]
        for value in flickers
        for event in judge.judge({"ffn_fraction": value})
    ]
    assert event.held_for == 5, "since the first of them"
    # Goes on in the middle.
    for cut in range(5):
        before = RuleJudge([rule], [1])
        head = judged(before, flickers[:cut])
        after = RuleJudge([rule], [1], json.loads(json.dumps(before.state())))
        assert head + judged(after, flickers[cut:]) == [*"....", "+"]


def test_a_state_without_steps_that_held_is_read() -> None:
    """As a checkpoint of an earlier version has it."""
    state = {"clock": 5, "firings": {"low": 1}, "places": [["low", 1, "firing", 5, None, "warn"]]}
    assert RuleJudge([LOW], [1], state).places("warn") == {1}


def test_between_limit_and_clear_nothing_changes() -> None:
    judge = RuleJudge([LOW], [1])
    judged(judge, [[0.1]] * 3)
    assert judged(judge, [[0.3]] * 10) == ["."] * 10
    # Healthy steps must come in a row.
    assert judged(judge, [[0.5], [0.3], [0.5], [0.1], [0.5], [0.5]]) == [*".....", "-"]


def test_what_was_not_measured_changes_nothing_but_time_passes() -> None:
    judge = RuleJudge([LOW], [1])
    assert judged(judge, [[0.1], None, [math.nan], [0.1]]) == [".", ".", ".", "+"]
    assert judged(RuleJudge([LOW], [1]), [[0.1], None, [0.5], [0.1]]) == ["."] * 4


def test_each_layer_by_itself_or_their_mean() -> None:
    judge = RuleJudge([LOW], [2, 4])
    judged(judge, [[0.1, 0.5]] * 3)
    assert judge.places("safe_mode") == {4 - 2}
    mean = RuleJudge([replace(LOW, per_layer=False)], [2, 4])
    assert judged(mean, [[0.1, 0.5]] * 3) == ["."] * 3
    assert judged(mean, [[0.1, 0.25]] * 3) == [".", ".", "+"]
    assert mean.places("safe_mode") == {WHOLE_MODEL}
    assert judged(RuleJudge([replace(LOW, metric="loss")], [2, 4]), [0.1] * 3, "loss")[-1] == "+"


def test_the_next_beginning_waits() -> None:
    rule = replace(LOW, for_steps=1, clear_for_steps=1, min_steps_between=4)
    steps = [[0.1], [0.5], [0.1], [0.1], [0.1], [0.1]]
    assert judged(RuleJudge([rule], [1]), steps) == ["+", "-", ".", ".", ".", "+"]


def test_a_used_up_rule_only_warns() -> None:
    rule = replace(LOW, for_steps=1, clear_for_steps=1, max_firings=2)
    judge = RuleJudge([rule], [1, 2])
    first, second, third = (
        judge.judge({"ffn_fraction": v}) for v in ([0.1, 1], [1, 0.1], [0.1, 1])
    )
    assert [event.action for event in (*first, *second)] == ["safe_mode", "safe_mode", "safe_mode"]
    (event,) = [event for event in third if event.begins]
    assert (event.action, event.is_used_up, event.layer) == ("warn", True, 1)
    assert judge.places("safe_mode") == set()


def test_layers_that_go_wrong_together_use_up_one_firing() -> None:
    rule = replace(LOW, for_steps=1, max_firings=1)
    events = RuleJudge([rule], [1, 2, 3]).judge({"ffn_fraction": [0.1, 0.5, 0.1]})
    assert [(event.layer, event.action) for event in events] == [(1, "safe_mode"), (3, "safe_mode")]


def test_a_state_goes_on_in_the_middle_of_an_action() -> None:
    steps = [[0.1], [0.1], [0.1], [0.5], [0.1], [0.5], [0.5], [0.1], [0.1], [0.1]]
    whole = judged(RuleJudge([LOW], [1]), steps)
    for cut in range(len(steps)):
        before = RuleJudge([LOW], [1])
        head = judged(before, steps[:cut])
        state = json.loads(json.dumps(before.state()))
        after = RuleJudge([LOW], [1], state)
        assert after.places("safe_mode") == before.places("safe_mode")
        assert head + judged(after, steps[cut:]) == whole
    assert RuleJudge([replace(LOW, name="other")], [1], state).state()["places"] == []


def test_a_state_does_not_change_with_later_steps() -> None:
    judge = RuleJudge([LOW], [1])
    judged(judge, [[0.1]] * 2)
    state = judge.state()
    copy = json.dumps(state)
    judged(judge, [[0.1]] * 2)
    assert json.dumps(state) == copy


def test_going_back_keeps_what_was_done() -> None:
    rule = replace(LOW, for_steps=2, max_firings=1, action="rollback")
    judge = RuleJudge([rule], [1])
    assert judged(judge, [[0.1]] * 2) == [".", "+"]
    (ended,) = judge.forget()
    assert (ended.begins, ended.layer, ended.action) == (False, 1, "rollback")
    assert judge.forget() == []
    (event,) = [*judge.judge({"ffn_fraction": [0.1]}), *judge.judge({"ffn_fraction": [0.1]})]
    assert event.action == "warn"


def test_default_rules_are_complete_and_look_at_what_is_measured() -> None:
    for rule in map(complete, DEFAULT_RULES):
        assert rule.metric in GUARD_METRICS
        assert rule.is_healthy(rule.clear)
        assert not rule.holds(rule.clear)


def test_a_rule_of_a_default_name_changes_that_rule() -> None:
    section = RoutingGuardSection(
        rules=[
            GuardRule(name="dead_expert", action="rollback"),
            GuardRule(name="entropy_collapse", action="none"),
            GuardRule(name="logit_explosion", above=30.0),
            GuardRule(name="mine", metric="loss", above=9.0),
        ]
    )
    rules = {rule.name: rule for rule in effective_rules(section)}
    assert rules["dead_expert"].action == "rollback"
    assert (rules["dead_expert"].for_steps, rules["dead_expert"].of_steps) == (75, 100)
    assert "entropy_collapse" not in rules
    # The old way back lies beyond the new limit.
    assert (rules["logit_explosion"].limit, rules["logit_explosion"].clear) == (30.0, 30.0)
    assert rules["mine"].condition == "> 9"
    alone = RoutingGuardSection(defaults=False, rules=section.rules[3:])
    assert [rule.name for rule in effective_rules(alone)] == ["mine"]


@pytest.mark.parametrize("value", [0.2, 0.25])
def test_limits_themselves_are_not_beyond(value: float) -> None:
    assert not LOW.holds(value)
    assert not LOW.is_healthy(value)
