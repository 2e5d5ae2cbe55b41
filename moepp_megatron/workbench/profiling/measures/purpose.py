"""The purpose of a collective: dispatch, combine, gradient reduce, parameter gather, ..."""

from __future__ import annotations

from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.groups import DATA_MEANINGS
from moepp_megatron.workbench.profiling.measures.place import place_of

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
