"""Where in the model a collective was called, and what it serves: dispatch, gradient reduce, ..."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.groups import DATA_MEANINGS

_PART = re.compile(r"layer(\d+)/(\w+)(?::(\w+))?")

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


@dataclass(frozen=True)
class Place:
    """A part of a layer in one of its passes.

    Attributes:
        layer: Global layer number.
        part: router, dispatch, experts, combine, attention, ...
        phase: forward, recompute (a forward pass that the backward pass repeats) or backward.
    """

    layer: int
    part: str
    phase: str


def place_of(collective: Collective) -> Place | None:
    """The innermost part of a layer that it was called in; None outside of layers."""
    for scope in reversed(collective.scopes):
        found = _PART.fullmatch(scope)
        if found is not None:
            return Place(int(found[1]), found[2], found[3] or "forward")
    return None


def purpose_of(collective: Collective, meaning: str) -> str:
    """The purpose of a call, one of `PURPOSES`.

    Where the recorder has put ranges, the part of the layer decides; then the group and operation.

    Args:
        collective: The call.
        meaning: Meaning of its group (`Group.meaning`).
    """
    place = place_of(collective)
    if place is not None and place.part in ("dispatch", "combine", "router"):
        return place.part
    operation = collective.operation
    if meaning == "context":
        # Ring attention sends and receives too.
        return "context parallel"
    if operation in (Operation.SEND, Operation.RECEIVE) or meaning == "pipeline":
        return "pipeline"
    if meaning in DATA_MEANINGS:
        return _of_data_parallel(collective)
    if meaning == "embedding" or "gradients" in collective.scopes:
        return "gradient reduce"
    if "optimizer" in collective.scopes:
        return "optimizer"
    if meaning.startswith("tensor"):
        return "tensor parallel"
    # Without ranges, tokens of experts can only be told from other things by their group.
    if meaning == "expert" and operation is Operation.ALL_TO_ALL:
        return "dispatch"
    return "other"


def _of_data_parallel(collective: Collective) -> str:
    if collective.operation is Operation.ALL_GATHER:
        return "parameter gather"
    if "optimizer" in collective.scopes:
        # The norm of the gradients, found infinities.
        return "optimizer"
    if collective.operation in (Operation.REDUCE_SCATTER, Operation.ALL_REDUCE):
        return "gradient reduce"
    return "other"
