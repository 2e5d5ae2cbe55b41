"""The parts of a run, made in the order of `features.registry`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moepp_megatron.features.registry import PARTS, named
from moepp_megatron.training.part import Part, PartContext


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
