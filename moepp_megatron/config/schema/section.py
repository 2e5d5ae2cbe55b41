"""Base of all configuration sections: strictness, immutability, paths, units."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import GroupedMetadata, Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError, PydanticKnownError

from moepp_megatron.config.paths import is_address, path_problem, place_problem
from moepp_megatron.experts import Setting

if TYPE_CHECKING:
    from moepp_megatron.config.rows import Rule, WorldSizeRule

# The most that a whole number may be, by the unit of its field: far above any model or cluster,
# and little enough that what is made for each layer, expert or rank fits into memory.
LARGEST = {
    "layers": 10_000,
    "chunks": 10_000,
    "experts": 65_536,
    "heads": 65_536,
    "processes": 65_536,
    "nodes": 1_048_576,
    "ranks": 1_048_576,
    "channels": 16_777_216,
}
LARGEST_OF_ALL = 2**31 - 1

# A folder that is written; a checkpoint with a second model; a GPU by name or file.
Use = Literal["output", "checkpoint", "gpu"]


@dataclass(frozen=True)
class Unit(GroupedMetadata):
    """The unit of a setting and its bounds, in its annotation; "1" is a pure number."""

    name: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the bounds, for pydantic."""
        return iter(Interval(gt=self.gt, ge=self.ge, lt=self.lt, le=self.le))


def unit_of(field: FieldInfo) -> str:
    """The unit of a field; "-" where it has none."""
    for each in field.metadata:
        if isinstance(each, Unit):
            return each.name
        if isinstance(each, Setting):
            return each.unit
    return "-"


def meaning_of(field: FieldInfo) -> str:
    """Return a field's meaning in one line: its schema docstring or the layer's own text."""
    said = [each.description for each in field.metadata if isinstance(each, Setting)]
    return " ".join((field.description or " ".join(said)).split())


def _without(find: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A validator that refuses text with a problem that `find` finds, before it becomes a path."""

    def check(value: Any) -> Any:
        problem = find(str(value)) if isinstance(value, str | Path) else None
        if problem is not None:
            raise PydanticCustomError("no_path", "{rule}|{remedy}", dict(problem._asdict()))
        return value

    return check


def _expanded(value: str) -> str:
    # Not by Path.expanduser, which raises for an unknown user.
    return value if is_address(value) else os.path.expanduser(value)


FilledText = Annotated[str, Field(min_length=1)]
# One rule for all of them: the shell does not expand "~" inside a YAML file, and a folder of that
# name is never meant, so it is expanded here; a variable is refused (`config.paths`).
# Strict everywhere except here: YAML has no path type, so a string is right.
ConfigPath = Annotated[
    Path,
    Strict(False),
    AfterValidator(lambda path: Path(_expanded(str(path)))),
    BeforeValidator(_without(path_problem)),
]
# What names either a path or something else.
PathText = Annotated[FilledText, AfterValidator(_without(path_problem)), AfterValidator(_expanded)]
# A path, an address of object storage, or another word, such as checkpoint.load: auto.
PlaceText = Annotated[
    FilledText, AfterValidator(_without(place_problem)), AfterValidator(_expanded)
]
# A folder, or an address of one.
Place = Annotated[
    PlaceText, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
]


class Section(BaseModel):
    """Base of all sections.

    Frozen, so that a run cannot drift from the configuration it recorded; strict, so that "8" or
    8.5 is never quietly read as 8; unknown keys and infinite numbers are refused.

    Attributes:
        own_rules: What must hold of its settings.
        world_size_rules: What must hold of them on a number of ranks.
        excludes: Settings that exclude others: both names, the refused one first, and why.
        instead: Another way to what `excludes` refuses.
        no_effect: Warnings of settings that have none.
        uses: Keys that name a second model, a GPU or a folder that is written: `key=kind`.
        megatron_flags: Megatron-LM's arguments: `name` for the key of this name, `name=key`, and
            `name=key:value` for one without a value.
        engine_defaults: Settings of features that the engine reads, with the value of a run without
            the feature.
        shorthand: Words that stand for the whole section, each with its keys.
        removed: Keys of earlier versions: the value that changes nothing, which resolved
            configurations still name, and what to do about another one.
        of_one_run: Keys of only one run, which others of its configuration do without, as do
            models that only run forward.
    """

    own_rules: ClassVar[tuple[Rule, ...]] = ()
    world_size_rules: ClassVar[tuple[WorldSizeRule, ...]] = ()
    excludes: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    instead: ClassVar[str] = ""
    no_effect: ClassVar[tuple[Rule, ...]] = ()
    uses: ClassVar[str] = ""
    megatron_flags: ClassVar[str] = ""
    engine_defaults: ClassVar[Mapping[str, Any]] = {}
    shorthand: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    removed: ClassVar[Mapping[str, tuple[Any, str]]] = {}
    of_one_run: ClassVar[str] = ""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="after")
    @classmethod
    def _bound_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a whole number that no machine could do anything with."""
        largest = LARGEST.get(unit_of(cls.model_fields[info.field_name or ""]), LARGEST_OF_ALL)
        for number in value if isinstance(value, list) else [value]:
            if type(number) is int and number > largest:
                raise PydanticKnownError("less_than_equal", {"le": largest})
            if type(number) is int and number < -LARGEST_OF_ALL:
                raise PydanticKnownError("greater_than_equal", {"ge": -LARGEST_OF_ALL})
        return value

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The value of a setting whose feature has been removed."""
            defaults = type(self).engine_defaults
            return defaults[name] if name in defaults else super().__getattr__(name)

    @classmethod
    def current(cls, keys: Mapping[Any, Any]) -> dict[Any, Any]:
        """The keys without removed ones that have the value that changes nothing."""
        removed = cls.removed
        return {k: v for k, v in keys.items() if k not in removed or v != removed[k][0]}

    def is_set(self, name: str) -> bool:
        """True if the user gave field `name` a value other than its default.

        A resolved configuration names every field, so a field at its default counts as not set.
        """
        field = type(self).model_fields[name]
        return name in self.model_fields_set and getattr(self, name) != field.get_default(
            call_default_factory=True, validated_data={}
        )

    def transformer_fields(self) -> dict[str, Any]:
        """Further fields of megatron-core's `TransformerConfig` that its settings need."""
        return {}
