"""The parts of a run, made in the order of `features.registry`, and their states."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from moepp_megatron.features.registry import PARTS, named
from moepp_megatron.training.part import Part, PartContext, State

# In what a checkpoint has besides the model: the parts' states by their keys.
STATES = "parts"
# Before states had keys, entries of several parts stood beside each other: by entry the key of the
# part, and the name in its state.
_EARLIER = {
    "corpus": ("data_stages", "corpus"),
    "token_bands": ("token_classes", "bands"),
    "teacher": ("distillation", "teacher"),
    "loss_course": ("numerical_guard", "loss_course"),
    "recent_samples": ("numerical_guard", "recent_samples"),
    "refused_batches": ("numerical_guard", "refused_batches"),
    "verdicts": ("numerical_guard", "verdicts"),
}


def part_kinds() -> Iterator[type[Part]]:
    """The class of each part, in order."""
    for kind in named(PARTS):
        assert isinstance(kind, type), f"{kind} is no class"
        assert issubclass(kind, Part), f"{kind} is no part"
        yield kind


def build_parts(run: PartContext, kinds: Iterable[type[Part]] | None = None) -> list[Part]:
    """Make the parts of a run, in order; every rank must call.

    Args:
        run: What they are made from.
        kinds: Their classes; None for all of `features.registry`.
    """
    for kind in part_kinds() if kinds is None else kinds:
        part = kind.of(run)
        if part is not None:
            run.parts.append(part)
    return run.parts


def states_of(extra: Mapping[str, Any]) -> dict[str, State]:
    """The parts' states by key from what a checkpoint of any version has besides the model."""
    if STATES in extra:
        return dict(extra[STATES])
    states: dict[str, dict[str, Any]] = {}
    for entry, value in extra.items():
        if entry in _EARLIER:
            key, name = _EARLIER[entry]
            states.setdefault(key, {})[name] = value
        elif value is not None:
            states[entry] = value
    return dict(states)
