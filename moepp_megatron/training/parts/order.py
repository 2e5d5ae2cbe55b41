"""The parts of a run, made in the order of `features.registry`, and their states."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.plugins import load_plugin
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
    "shift": ("guard", "shift"),
}


def _part_kinds(plugins: Sequence[str] = ()) -> Iterator[type[Part]]:
    """Yield the classes of parts in order, plugins last; ConfigError if one is no such class."""
    found = [*named(PARTS), *(load_plugin("parts", "run.parts", name) for name in plugins)]
    for kind, name in zip(found, (*PARTS, *plugins), strict=True):
        if not (isinstance(kind, type) and issubclass(kind, Part)):
            raise ConfigError(
                f"run.parts ({name}) must be a class derived from {Part.__module__}.Part, and is "
                f"{kind!r}; name such a class as the entry point"
            )
        yield kind


def build_parts(run: PartContext, kinds: Iterable[type[Part]] | None = None) -> list[Part]:
    """Make the parts of a run, in order; every rank must call."""
    for kind in _part_kinds(run.config.run.parts) if kinds is None else kinds:
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
        elif isinstance(value, Mapping):
            states[entry] = {**value, **states.get(entry, {})}
    return dict(states)
