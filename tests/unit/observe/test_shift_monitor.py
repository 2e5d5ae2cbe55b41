"""All series together: one event for a change, its cause, and what is usual after it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from moepp_megatron.observe.shift.monitor import GROUPS, Observed, ShiftMonitor, group_of

LAYERS, EXPERTS, TOKENS = (2, 4), 6, 3000
SHARES = np.array([0.3, 0.2, 0.1, 0.1, 0.2, 0.1])
GROUP_SHARES = np.arange(1.0, GROUPS + 1) / np.arange(1.0, GROUPS + 1).sum()
SAVED = 150


class Run:
    """Steps of a training; each setting is what a change makes of it."""

    def __init__(self, seed=1):
        self._chance, self.step = np.random.default_rng(seed), 0
        names = [f"FFN {index}" for index in range(EXPERTS)]
        self.monitor = ShiftMonitor(10_000.0, LAYERS, names)

    def observed(self, loss=0.0, shares=SHARES, groups=GROUP_SHARES, logits=1.0):
        chance = self._chance
        noise = np.exp(chance.normal(0.0, 0.05, size=(len(LAYERS), EXPERTS)))
        experts = [chance.multinomial(2 * TOKENS, p / p.sum()) for p in shares * noise]
        batch, _ = chance.normal(0.0, 0.1, size=2)
        course = 3.0 + 2.0 * math.exp(-self.step / 60) + batch
        mixed = groups * np.exp(chance.normal(0.0, 0.1, size=GROUPS))
        return Observed(
            np.array(experts, dtype=np.float64),
            course + loss,
            math.exp(chance.normal(-1.0, 0.1)),
            logits * np.exp(chance.normal(0.0, 0.02, size=len(LAYERS))),
            chance.multinomial(TOKENS, mixed / mixed.sum()).astype(np.float64),
        )

    def take(self, steps, **changes):
        """The event's cause after each step."""
        causes = []
        for _ in range(steps):
            self.step += 1
            self.monitor.add(self.step, self.observed(**changes))
            event = self.monitor.event
            causes.append(None if event is None else event.cause)
        return causes


OTHER_GROUPS = GROUP_SHARES[::-1]
OTHER_SHARES = SHARES[::-1]
DATA = {"loss": 1.0, "shares": OTHER_SHARES, "groups": OTHER_GROUPS}


def trained(seed=1):
    run = Run(seed)
    assert run.take(SAVED) == [None] * SAVED
    assert run.monitor.is_calm
    return run


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        (DATA, "data"),
        # Learnt at once, but for its words.
        ({"groups": OTHER_GROUPS}, "data"),
        ({"shares": OTHER_SHARES}, "router"),
        ({"shares": OTHER_SHARES, "loss": 0.5}, "router"),
        ({"logits": 20.0}, "router"),
        ({"loss": 1.0}, "unknown"),
    ],
)
def test_the_cause_is_known_within_ten_steps(changes, cause):
    for seed in range(3):
        run = trained(seed)
        found = run.take(10, **changes)
        assert next(i for i, each in enumerate(found, 1) if each is not None) <= 5
        assert cause in found, seed
        assert set(found) <= {None, "unknown", cause}, "it was never another one"
        event = run.monitor.event
        if event is not None:
            assert event.since == SAVED + 1
            # It may be the last update before that has damaged the weights.
            assert event.newest_healthy == (SAVED if event.cause == "data" else SAVED - 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixture_is_a_change_of_the_data_since_its_first_step(seed):
    """Its evidence grows for many steps; a checkpoint among them is not one from before it."""
    run = trained(seed)
    groups = 0.975 * GROUP_SHARES + 0.025 * OTHER_GROUPS
    while run.monitor.event is None:
        run.take(1, groups=groups)
    assert SAVED + 5 < run.step <= SAVED + 60
    assert run.monitor.event.cause == "data"
    assert SAVED - 10 <= run.monitor.event.since <= SAVED + 5


@pytest.mark.parametrize("gap", range(14, 35, 4))
def test_data_that_change_again_are_no_fault_of_the_routers(gap):
    """Token ids are judged again ten steps after a change; before, they say nothing."""
    run = trained()
    run.take(gap, **DATA)
    back = run.take(20, loss=0.5)
    assert "data" in back
    assert "router" not in back


def test_what_grows_step_by_step_is_not_of_the_routers_alone():
    """A learning rate or a weight decay that is too high moves logits a little in each step."""
    run = trained()
    found = [run.take(1, logits=1.15**step, loss=0.1 * step)[0] for step in range(1, 9)]
    assert set(found) == {None, "unknown"}
    assert run.monitor.fault > 1.0


@pytest.mark.parametrize("is_refused", [True, False])
def test_refused_batches_confirm_no_fault_of_the_routers(is_refused):
    run = trained()
    for _ in range(6):
        run.monitor.add(SAVED + 1, run.observed(shares=OTHER_SHARES), is_refused)
    assert (run.monitor.fault > 0.0) is not is_refused


def test_a_change_is_one_event_and_then_usual():
    """Ten steps after its last alarm it is over; other data that follow are another event."""
    run = trained()
    causes = run.take(40, **DATA)
    first = next(i for i, cause in enumerate(causes) if cause is not None)
    over = next(i for i, cause in enumerate(causes) if cause is None and i > first)
    assert over <= 20
    assert causes[over:] == [None] * len(causes[over:])
    assert run.monitor.is_calm
    assert "data" in run.take(6), "the old data"


def test_what_is_only_suspect_at_a_switch_raises_no_alarm_later():
    """Routing that moves slowly behind the data must not look like a fault of the routers."""
    run = trained()
    for step in range(40):
        shares = SHARES + min(step / 20.0, 1.0) * (OTHER_SHARES - SHARES)
        (cause,) = run.take(1, **{**DATA, "shares": shares})
        assert cause in (None, "unknown", "data")


def test_routers_that_were_put_back_are_as_before():
    run = trained()
    while run.monitor.fault <= 1.0:
        run.take(1, shares=OTHER_SHARES)
    assert run.step <= SAVED + 5
    run.monitor.resolve_fault(is_mended=True)
    assert set(run.take(9)) == {"router"}
    assert run.take(20)[-1] is None
    # The same fault again is found again.
    assert "router" in run.take(5, shares=OTHER_SHARES)


def test_routers_that_stay_as_they_are_become_usual():
    run = trained()
    run.take(5, shares=OTHER_SHARES)
    run.monitor.resolve_fault(is_mended=False)
    assert run.take(30, shares=OTHER_SHARES)[-1] is None


def test_healthy_routers_are_known_by_calm_steps():
    run = trained()
    run.take(1, logits=20.0)
    assert not run.monitor.is_calm, "before there is an alarm"


def test_what_has_moved_is_named():
    run = trained()
    while run.monitor.event is None or run.monitor.event.cause != "router":
        run.take(1, shares=OTHER_SHARES, logits=20.0)
    text = "; ".join(run.monitor.event.moved)
    assert text.startswith("loss ")
    assert "layer 2 FFN" in text
    assert "times as large" in text


def test_what_is_not_known_is_not_judged():
    """One sequence has no spread."""
    run = Run()
    for step in range(1, 121):
        run.monitor.add(step, replace(run.observed(), spread=math.nan))
    # Each has its place: ranks send each other as many numbers.
    assert run.monitor.metrics.keys() == {
        "routing_shift",
        "logit_shift",
        "loss_shift",
        "token_shift",
    }
    assert not any(math.isnan(value) for value in run.monitor.metrics.values())


@pytest.mark.parametrize("cut", [20, SAVED + 1, SAVED + 3])
def test_a_state_continues_to_the_bit(cut):
    steps = Run()
    observed = [steps.observed() for _ in range(SAVED)]
    observed += [steps.observed(**DATA) for _ in range(20)]
    whole, parts, again = (Run().monitor for _ in range(3))
    for step, each in enumerate(observed, 1):
        whole.add(step, each)
        if step <= cut:
            parts.add(step, each)
        if step == cut:
            again.load(json.loads(json.dumps(parts.state())))
        if step > cut:
            again.add(step, each)
    assert again.state() == whole.state()


def test_neighbouring_ids_are_in_different_groups():
    groups = group_of(np.arange(4096))
    assert set(groups.tolist()) == set(range(GROUPS))
    assert (np.diff(groups) != 0).all()
