"""The guard's parts that need no ranks: metrics, safe mode, raised tau, wording."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moepp_megatron.config.guard_metrics import COUNTED, MEASURED
from moepp_megatron.config.guard_rules import CompleteRule
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, Event, RuleJudge
from moepp_megatron.observe.shift.reading import ShiftStory
from moepp_megatron.training.guard.actions import RaisedTau, SafeMode
from moepp_megatron.training.guard.alerts import alert_of
from moepp_megatron.training.guard.readings import counted, measured

LAYERS = [2, 4]
RULE = CompleteRule(
    name="low",
    metric="ffn_to_target",
    limit=0.25,
    is_above=False,
    clear=0.5,
    for_steps=20,
    clear_for_steps=10,
    severity="critical",
    action="safe_mode",
    max_firings=3,
)


def test_metrics_of_counts() -> None:
    # Two FFN experts and two others, 10 tokens with two experts each.
    selected = torch.tensor([[9.0, 3.0, 6.0, 2.0], [0.0, 0.0, 20.0, 0.0]], dtype=torch.float64)
    found = counted(selected, num_ffn=2, topk=2, wanted_share=0.5)
    assert set(found) == set(COUNTED)
    assert found["ffn_fraction"] == [0.6, 0.0]
    assert found["ffn_to_target"] == [1.2, 0.0]
    assert found["ffn_per_token"] == [1.2, 0.0]
    assert found["max_ffn_load"][0] == 1.5
    assert found["min_ffn_load"][0] == 0.5
    assert found["max_expert_share"] == [0.45, 1.0]
    assert found["max_expert_tokens"][0] == 0.9
    # Without any FFN selection no expert is deader than another.
    assert math.isnan(found["min_ffn_load"][1])
    assert math.isnan(found["max_ffn_load"][1])


def test_metrics_of_router_health() -> None:
    found = measured({"gate_entropy": [math.log(4), 0.0], "logit_variance": [3.0, 4.0]}, 4)
    assert found["gate_entropy_ratio"] == [1.0, 0.0]
    assert found["logit_variance"] == [3.0, 4.0]
    assert set(found) <= set(MEASURED)
    assert measured({}, 4) == {}


def safe_mode() -> tuple[SafeMode, RuleJudge]:
    """That of a pipeline stage without routers; two steps begin it, and two end it."""
    judge = RuleJudge([replace(RULE, for_steps=2, clear_for_steps=2)], LAYERS)
    model: Any = SimpleNamespace(models=[], gathered_parameters=nullcontext)
    return SafeMode(model, judge, LAYERS, {}), judge


def taken(safe: SafeMode, judge: RuleJudge, step: int, *values: float) -> tuple[Any, list[str]]:
    """Layers switched off after a step in which each layer had this value, and what alerts say."""
    safe.begin_step(step)
    found = {RULE.metric: list(values)}
    events = judge.judge(found)
    safe.end_step(events, found)
    return safe.ffn_only(), [safe.note(event) for event in events]


NONE = "no copy of a healthy router to go back to"
BACK = "the router has its weights of before step 20 again"


def test_safe_mode_overrules_a_router_of_which_there_is_no_copy() -> None:
    safe, judge = safe_mode()
    taken(safe, judge, 10, 0.6, 0.3)
    # In layer 4 nothing held before, but it was not healthy either.
    assert taken(safe, judge, 11, 0.6, 0.1) == (set(), [])
    assert taken(safe, judge, 12, 0.6, 0.1) == ({4}, [NONE])
    assert taken(safe, judge, 13, 0.6, 0.6)[0] == {4}
    assert taken(safe, judge, 14, 0.6, 0.6) == (set(), [""])


def test_safe_mode_overrules_a_router_that_its_weights_from_before_do_not_help() -> None:
    safe, judge = safe_mode()
    for step in (10, 19, 20, 21):
        taken(safe, judge, step, 0.6, 0.6)
    assert taken(safe, judge, 22, 0.1, 0.1) == (set(), [])
    # A step that is seen to be bad is not copied.
    assert taken(safe, judge, 30, 0.1, 0.1) == (set(), [BACK] * 2)
    assert taken(safe, judge, 31, 0.4, 0.4)[0] == set()
    assert taken(safe, judge, 32, 0.2, 0.6)[0] == {2}
    assert taken(safe, judge, 33, 0.6, 0.6)[0] == {2}
    assert taken(safe, judge, 34, 0.6, 0.6)[0] == set()


def test_tau_is_raised_at_once_and_falls_slowly() -> None:
    raised = RaisedTau(LAYERS, factor=4.0, half_life=2.0)
    raised.step({4})
    assert raised.factors == {2: 1.0, 4: 4.0}
    raised.step(set())
    raised.step(set())
    # Half of the logarithm.
    assert raised.factors[4] == pytest.approx(2.0)
    again = RaisedTau(LAYERS, 4.0, 2.0, json.loads(json.dumps(raised.state())))
    assert again.factors == raised.factors
    for _ in range(40):
        raised.step(set())
    assert raised.factors == {2: 1.0, 4: 1.0}
    assert raised.state() == []
    raised.step({WHOLE_MODEL})
    assert raised.factors == {2: 4.0, 4: 4.0}


def test_alerts_say_what_was_done_and_what_was_not() -> None:
    begins = Event(RULE, 4, True, "safe_mode", 0.1, 20)
    alert = alert_of(begins, 70, is_dry_run=False)
    assert alert.text() == (
        "critical at step 70: low: ffn_to_target of layer 4 is 0.1 (< 0.25 for 20 steps); action: "
        "safe_mode"
    )
    assert alert_of(begins, 70, is_dry_run=True).action == "safe_mode (dry run)"
    ends = alert_of(Event(RULE, WHOLE_MODEL, False, "safe_mode", 0.6, 10), 90, is_dry_run=False)
    assert (ends.severity, ends.action, ends.layer) == ("info", "end of safe_mode", None)
    assert ends.condition == ">= 0.5 for 10 steps"
    warned = alert_of(Event(RULE, 4, True, "warn", 0.1, 20), 70, is_dry_run=True)
    assert warned.action == "warn", "the same whether or not the guard may act"
    story = ShiftStory("data", 3, 5e4, ["loss 2.00 -> 3.00", "layer 2 FFN 1 8.0% -> 21.0%"])
    shift = alert_of(begins, 70, is_dry_run=False, story=story)
    assert (shift.cause, shift.since, shift.chance_steps) == ("data", 68, 5e4)
    assert shift.moved == story.moved
    assert shift.text() == (
        "critical at step 70: low: ffn_to_target of layer 4 is 0.1 (< 0.25 for 20 steps; the data: "
        "loss and routing, or token ids; since step 68; loss 2.00 -> 3.00, "
        "layer 2 FFN 1 8.0% -> 21.0%); action: safe_mode"
    )
    assert '"cause"' not in alert.to_json_line()
    used_up = alert_of(Event(RULE, 4, True, "warn", 0.1, 20, is_used_up=True), 95, False)
    assert used_up.condition.endswith("taken 3 times (max_firings), so only told")
    back = alert_of(Event(RULE, 4, False, "safe_mode", math.nan, 0), 99, False, "went back")
    assert back.condition == "went back"
    assert '"value":null' in back.to_json_line()
