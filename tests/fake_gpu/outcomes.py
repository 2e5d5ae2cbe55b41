"""Checks of the outcomes of played cases."""

from collections.abc import Callable
from typing import Any

from tests.fake_gpu import reads

Outcomes = list[dict[str, Any]]
Play = Callable[..., Outcomes]


def sound(outcomes):
    for outcome in outcomes:
        assert outcome["error"] + outcome["refused"] == "", outcome["error"] + outcome["refused"]
        assert outcome["faults"] == []
        assert outcome["kernels"] > 50 * max(1, outcome["layers"]), "nothing was played"
    return outcomes


def excess(outcome, layer):
    """Reads that the tables do not allow."""
    allowed = dict(reads.STEP)
    for table in layer:
        allowed |= {key: count * outcome["layers"] for key, count in table.items()}
    found = outcome["reads"]
    return {key: count for key, count in found.items() if count > allowed.get(key, 0)}


def token_id_kernels(layers):
    """Counts of token ids: one kernel a step, and three in each micro-batch of the two layers."""
    return 1 + 3 * layers // 2
