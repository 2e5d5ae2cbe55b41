"""Each default rule on a course of its metric that is healthy, and on one that is not."""

from collections.abc import Callable

import numpy as np
import pytest

from moepp_megatron.config.guard_metrics import COMPARED, COUNTED, MEASURED
from moepp_megatron.config.guard_rules import CompleteRule, effective_rules
from moepp_megatron.config.schema.routing_guard import RoutingGuardSection
from moepp_megatron.observe.guard_judge import Event, RuleJudge

LAYERS = [1, 2, 3]
STEPS = 300
RULES = {rule.name: rule for rule in effective_rules(RoutingGuardSection())}

# Of each rule's metric: mean and spread of a healthy course, and of one with a fault, as
# docs/guard.md has them from trainings.
COURSES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "collapse_to_zero_computation": ((0.9, 0.15), (0.03, 0.02)),
    "fall_of_ffn_experts": ((1.0, 0.12), (0.3, 0.04)),
    "sudden_fall_of_ffn_experts": ((1.0, 0.12), (0.1, 0.04)),
    "few_ffn_experts": ((0.9, 0.05), (0.5, 0.05)),
    "many_ffn_experts": ((1.0, 0.1), (1.8, 0.1)),
    "rare_ffn": ((1.0, 0.1), (0.3, 0.05)),
    "ffn_never_skipped": ((0.6, 0.05), (0.998, 0.002)),
    "dead_expert": ((0.5, 0.15), (0.0, 0.005)),
    "one_expert_for_all": ((0.4, 0.08), (0.95, 0.02)),
    "logit_explosion": ((2.0, 0.5), (200.0, 20.0)),
    "entropy_collapse": ((0.7, 0.05), (0.01, 0.003)),
    "data_shift": ((0.3, 0.1), (1.4, 0.1)),
    "loss_shift": ((0.3, 0.1), (1.4, 0.1)),
    "token_shift": ((0.1, 0.1), (2.0, 0.2)),
    "source_shift": ((0.3, 0.1), (1.4, 0.1)),
    "gradient_growth": ((1.0, 0.15), (8.0, 1.0)),
    "loss_plateau": ((0.02, 0.01), (0.7, 0.02)),
    "loss_near_zero": ((2.5, 0.1), (0.02, 0.005)),
}
Draw = Callable[[tuple[float, float]], float | list[float]]


def course(rule: CompleteRule, seed: int) -> Draw:
    """Draws the metric as the guard reads it: a number, or one of each layer."""
    chance = np.random.default_rng([seed, sorted(RULES).index(rule.name)])
    by_layer = rule.metric in {**COUNTED, **COMPARED, **MEASURED}

    def draw(of: tuple[float, float]) -> float | list[float]:
        values = np.maximum(chance.normal(*of, size=len(LAYERS)), 0.0)
        return values.tolist() if by_layer else float(values[0])

    return draw


def events(
    judge: RuleJudge, rule: CompleteRule, draw: Draw, of: tuple[float, float]
) -> list[Event]:
    return [event for _ in range(STEPS) for event in judge.judge({rule.metric: draw(of)})]


def test_every_rule_has_its_courses() -> None:
    assert COURSES.keys() == RULES.keys()


@pytest.mark.parametrize("name", list(COURSES))
@pytest.mark.parametrize("seed", range(3))
def test_a_rule_is_silent_on_a_healthy_course_and_told_on_a_faulty_one(name: str, seed: int):
    rule = RULES[name]
    healthy, faulty = COURSES[name]
    draw, judge = course(rule, seed), RuleJudge([rule], LAYERS)
    assert events(judge, rule, draw, healthy) == []
    found = events(judge, rule, draw, faulty)
    assert found, "nothing was told"
    assert found[0].begins
    assert found[0].action == rule.action
    # And it ends.
    ends = events(judge, rule, draw, healthy)
    assert len([event for event in ends if not event.begins]) == len(
        {event.layer for event in found}
    )
