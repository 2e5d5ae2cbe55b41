"""Where in the model a collective was called, and what it serves: dispatch, gradient reduce, ..."""

import re
from typing import NamedTuple

from moepp_megatron.tools.profiling.trace import POINT_TO_POINT, Collective, Operation

_PART = re.compile(r"layer(\d{1,9})/(\w+)(?::(\w+))?")
_DATA_MEANINGS = ("data", "expert data", "tensor and data")

# In the order in which tables show them.
PURPOSES = (
    "dispatch",
    "combine",
    "router",
    "tensor parallel",
    "context parallel",
    "pipeline",
    "gradient reduce",
    "parameter gather",
    "optimizer",
    "other",
)


class Place(NamedTuple):
    """A part of a layer in one of its passes."""

    layer: int  # global number
    part: str  # router, dispatch, experts, combine, attention, ...
    phase: str  # forward, recompute (a forward pass that backward repeats) or backward


def place_of(collective: Collective) -> Place | None:
    """The innermost part of a layer that it was called in; None outside of layers."""
    for scope in reversed(collective.scopes):
        if match := _PART.fullmatch(scope):
            return Place(int(match[1]), match[2], match[3] or "forward")
    return None


def purpose_of(collective: Collective, meaning: str) -> str:
    """The purpose of a call, one of `PURPOSES`.

    Where the recorder has put ranges, the part of the layer decides; then the group and operation.
    """
    place, operation = place_of(collective), collective.operation
    in_optimizer = "optimizer" in collective.scopes
    if place is not None and place.part in ("dispatch", "combine", "router"):
        return place.part
    if meaning == "context":
        # Ring attention sends and receives too.
        return "context parallel"
    if operation in POINT_TO_POINT or meaning == "pipeline":
        return "pipeline"
    if meaning in _DATA_MEANINGS and operation is Operation.ALL_GATHER:
        return "parameter gather"
    if meaning in _DATA_MEANINGS and not in_optimizer:
        reduces = operation in (Operation.REDUCE_SCATTER, Operation.ALL_REDUCE)
        return "gradient reduce" if reduces else "other"
    if meaning == "embedding" or "gradients" in collective.scopes and not in_optimizer:
        return "gradient reduce"
    if in_optimizer:
        # The norm of the gradients, found infinities.
        return "optimizer"
    if meaning.startswith("tensor"):
        return "tensor parallel"
    # Without ranges, only their group distinguishes tokens of experts from other things.
    return "dispatch" if meaning == "expert" and operation is Operation.ALL_TO_ALL else "other"
