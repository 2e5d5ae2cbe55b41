"""The guard's parts that need no ranks: metrics, what alerts say."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch

from moepp_megatron.features.guard.alerts import alert_of, effective_rules
from moepp_megatron.features.guard.part import _counted
from moepp_megatron.features.guard.settings import COUNTED, RoutingGuardSection
from moepp_megatron.observe.guard_judge import WHOLE_MODEL, CompleteRule, Event
from moepp_megatron.observe.shift.monitor import Cause, ShiftEvent

RULES = {rule.name: rule for rule in effective_rules(RoutingGuardSection())}
SHIFT = ShiftEvent(
    since=68,
    first_alarm=70,
    newest=71,
    evidence=1.5,
    series=["loss"],
    cause="data",
    moved=["loss 3.10 -> 4.20"],
)


def test_metrics_of_counts():
    # Two FFN experts and two others, 10 tokens with two experts each.
    selected = torch.tensor([[9.0, 3.0, 6.0, 2.0], [0.0, 0.0, 20.0, 0.0]], dtype=torch.float64)
    found = _counted(selected, num_ffn=2, wanted_share=0.5)
    assert set(found) == {*COUNTED, "mean_ffn_to_target"}
    assert found["mean_ffn_to_target"] == pytest.approx(0.6)
    assert found["ffn_fraction"] == [0.6, 0.0]
    assert found["ffn_to_target"] == [1.2, 0.0]
    assert found["max_ffn_load"][0] == 1.5
    assert found["min_ffn_load"][0] == 0.5
    assert found["max_expert_share"] == [0.45, 1.0]
    # Without any FFN selection no expert is deader than another.
    assert math.isnan(found["min_ffn_load"][1])
    assert math.isnan(found["max_ffn_load"][1])


@pytest.mark.parametrize("cause", get_args(Cause))
def test_an_alert_of_a_shift_says_since_when_why_and_what_to_do(cause):
    event = Event(RULES["shift"], WHOLE_MODEL, True, 1.2)
    alert = alert_of(event, 71, "warn", shift=replace(SHIFT, cause=cause))
    assert (alert.rule, alert.severity, alert.action) == ("shift", "warning", "warn")
    assert (alert.cause, alert.since, alert.moved) == (cause, 68, SHIFT.moved)
    assert "since step 68; loss 3.10 -> 4.20" in alert.condition
    assert f"(docs/guard.md#{cause})" in alert.remedy
    assert alert.text().endswith(f"action: warn; {alert.remedy}")


def test_the_end_of_a_shift_is_no_recovery():
    event = Event(RULES["shift"], WHOLE_MODEL, False, 0.0)
    alert = alert_of(event, 90, "accepted as usual", shift=SHIFT)
    assert (alert.severity, alert.action, alert.remedy) == ("info", "accepted as usual", None)
    assert (alert.cause, alert.since, alert.value, alert.condition) == ("data", 68, 0.0, "")


def test_a_fault_that_was_mended_asks_for_its_cause():
    event = Event(RULES["router_fault"], WHOLE_MODEL, True, 1.4)
    shift = replace(SHIFT, cause="router")
    mended = alert_of(event, 71, "put_back of step 60", shift=shift)
    dry = alert_of(event, 71, "put_back (dry run)", shift=shift)
    assert mended.severity == "critical"
    assert "find out what damaged" in mended.remedy
    assert dry.remedy is not None


def test_an_alert_of_a_layer():
    rule = CompleteRule(
        "mine", "ffn_to_target", limit=0.25, is_above=False, clear=0.5, for_steps=20
    )
    begins = alert_of(Event(rule, 4, True, 0.1), 70, "warn")
    assert (begins.layer, begins.condition, begins.remedy) == (4, "< 0.25 for 20 steps", None)
    ends = alert_of(Event(rule, 4, False, math.nan), 99, "end of warn", "went back")
    assert (ends.severity, ends.condition) == ("info", "went back")
