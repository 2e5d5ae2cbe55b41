"""The place in the model at which a collective was called: layer, part, pass; from its scopes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.collective import Collective

_PART = re.compile(r"layer(\d+)/(\w+)(?::(\w+))?")


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
    """The innermost part of a layer around the call; None outside of layers."""
    for scope in reversed(collective.scopes):
        found = _PART.fullmatch(scope)
        if found is not None:
            return Place(int(found[1]), found[2], found[3] or "forward")
    return None
