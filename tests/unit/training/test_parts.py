"""The parts of a run: whose state is whose, in checkpoints of today and of before."""

import pytest

from moepp_megatron.training.part import Part, Parts
from moepp_megatron.training.parts.order import STATES, _part_kinds, states_of
from tests.refusals import config_error

# What checkpoints held before states had keys.
SHIFT = {"detectors": {}, "event": None}
GUARD = {"rules": [["mine", 2, True, 3]], "copies": [], "actions": 1}
BUDGET = {"shares": None, "missing": [0.0], "off": 0.1, "rules": []}
NUMERICS = {
    "loss_course": {"counts": [1, 1, 0]},
    "recent_samples": [0, 4],
    "refused_batches": [[None, [[1.0]]]],
    "verdicts": [True],
}
EARLIER = [
    ({"corpus": "c0"}, {"data_stages": {"corpus": "c0"}}),
    ({"corpus": None}, {"data_stages": {"corpus": None}}),
    ({"token_bands": "0123"}, {"token_classes": {"bands": "0123"}}),
    ({"budget": BUDGET}, {"budget": BUDGET}),
    ({"guard": GUARD, "shift": SHIFT}, {"guard": {**GUARD, "shift": SHIFT}}),
    ({"shift": SHIFT, "guard": GUARD}, {"guard": {**GUARD, "shift": SHIFT}}),
    ({"guard": None}, {}),
    # Of a version that kept a list, which nobody reads any more.
    ({"recent_losses": [4.5, 4.4]}, {}),
    ({"teacher": "ab" * 32}, {"distillation": {"teacher": "ab" * 32}}),
    (NUMERICS, {"numerical_guard": NUMERICS}),
]


@pytest.mark.parametrize(("extra", "states"), EARLIER)
def test_states_of_earlier_checkpoints(extra, states):
    assert states_of(extra) == states
    # Each key is that of a part.
    assert states.keys() <= {kind.key for kind in _part_kinds()}
    assert states_of({STATES: states}) == states


def test_all_that_an_earlier_checkpoint_has():
    whole, expected = {}, {}
    for extra, states in EARLIER:
        whole |= extra
        expected |= states
    # The row without a guard took the place of the one with it.
    expected["guard"] = {"shift": SHIFT}
    assert states_of(whole) == expected


class Kept(Part):
    key = "kept"

    def __init__(self):
        self.loaded = []

    def state(self):
        return {"loaded": len(self.loaded)}

    def load(self, state, why, step):
        self.loaded.append((dict(state), why, step))
        return ()


class Keyless(Kept):
    key = ""


class Stateless(Part):
    pass


def test_each_part_has_its_own_state():
    parts = Parts([kept := Kept(), Stateless(), Stateless()])
    parts.load({"other": {"a": 1}}, "resume", 0)
    parts.load({"kept": {"loaded": 1}, "other": {"a": 1}}, "rollback", 7)
    assert kept.loaded == [({}, "resume", 0), ({"loaded": 1}, "rollback", 7)]
    assert parts.state() == {"kept": {"loaded": 2}}


def test_two_parts_of_one_key_are_refused():
    with config_error(r"^key \(kept\) of part Kept must be its own, and is"):
        Parts([Kept(), Kept()])
    with config_error("^part Keyless must have a key, since it has a state"):
        Parts([Keyless()])
