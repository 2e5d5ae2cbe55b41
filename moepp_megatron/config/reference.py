"""Describes every setting of the configuration from the schema: type, default, unit, range."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moepp_megatron.config.errors import show
from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema import Section
from moepp_megatron.config.schema.section import meaning_of, unit_of
from moepp_megatron.config.sections import is_optional, section_models, subsection

_SIGNS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}"}
_KINDS = {"int": "whole number", "float": "number", "bool": "true or false", "str": "text"}


@dataclass(frozen=True)
class _SettingReference:
    """A setting; `default` is None where it must be given, `unit` "-" for what is no quantity."""

    name: str
    kind: str
    default: str | None
    unit: str
    allowed: tuple[str, ...]
    meaning: str

    @property
    def key(self) -> str:
        """The name without its section."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class _SectionReference:
    """A section with its own settings; sections inside it follow as entries of their own."""

    name: str
    meaning: str
    settings: tuple[_SettingReference, ...]


def section_references() -> Iterator[_SectionReference]:
    """Every section in the order of the schema, those inside another one after it."""
    for name, model in section_models().items():
        yield from _section(name, model)


def _section(path: str, model: type[Section], meaning: str = "") -> Iterator[_SectionReference]:
    inside: list[tuple[str, type[Section], str]] = []
    settings = []
    for key, field in model.model_fields.items():
        name = f"{path}.{key}"
        section, entry = subsection(model, key), _entry(field)
        if section is not None:
            optional = " May be null." if is_optional(model, key) else ""
            inside.append((name, section, f"{meaning_of(field)}.{optional}"))
        elif entry is not None:
            inside.append((f"{name}[]", entry, f"{meaning_of(field)}."))
        else:
            settings.append(_setting(name, field))
    yield _SectionReference(
        path, meaning or " ".join((model.__doc__ or "").split()), tuple(settings)
    )
    for name, section, text in inside:
        yield from _section(name, section, text)


def _setting(name: str, field: FieldInfo) -> _SettingReference:
    default = None
    if not field.is_required():
        default = show(field.get_default(call_default_factory=True, validated_data={}))
    return _SettingReference(
        name,
        _kind(field.annotation),
        default,
        unit_of(field),
        tuple(_allowed(field)),
        meaning_of(field),
    )


def _entry(field: FieldInfo) -> type[Section] | None:
    """The section that each entry of a list is."""
    for kind in get_args(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _kind(annotation: Any) -> str:
    """Describe a type's YAML values in words; null is among the allowed values."""
    origin = get_origin(annotation)
    if _is_union(annotation):
        kinds = (_kind(kind) for kind in get_args(annotation) if kind is not type(None))
        return " or ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return "choice"
    if origin in (list, tuple):
        return f"list of {_kind(get_args(annotation)[0])}"
    if origin is dict:
        return "mapping"
    if origin is not None:
        # Annotated: a path, a bounded number.
        return _kind(get_args(annotation)[0])
    name = getattr(annotation, "__name__", str(annotation))
    return _KINDS.get(name, name.lower())


def _allowed(field: FieldInfo) -> Iterator[str]:
    for each in field.metadata:
        for sign, text in _SIGNS.items():
            if getattr(each, sign, None) is not None:
                yield text.format(f"{getattr(each, sign):g}")
    for value in _choices(field.annotation):
        yield show(value).strip("'")


def _choices(annotation: Any) -> Iterator[Any]:
    """The values of each Literal in a type, both truth values, and None where it may be null."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif annotation is bool:
        yield from (True, False)
    elif annotation is type(None):
        yield None
    elif isinstance(annotation, Plugin):
        yield "plugin:NAME"
    elif _is_union(annotation) or get_origin(annotation) in (list, Annotated):
        for kind in get_args(annotation):
            yield from _choices(kind)


def _is_union(annotation: Any) -> bool:
    # `Literal[...] | None` is a typing.Union, `int | None` is not.
    return isinstance(annotation, UnionType) or get_origin(annotation) is Union
