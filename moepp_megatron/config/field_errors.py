"""Turns pydantic's errors into problems with name, value, rule and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moepp_megatron.config.plugins import PREFIX, plugin_of
from moepp_megatron.config.problem import Problem, show
from moepp_megatron.config.schema import Section
from moepp_megatron.config.schema.section import meaning_of
from moepp_megatron.config.sections import section_models, subsection

# pydantic's error type -> (what must hold, what to write).
_TYPES = {
    "int_type": ("must be a whole number", "write it without quotes or decimals"),
    "float_type": ("must be a number", "write it without quotes"),
    "bool_type": ("must be true or false", "write true or false without quotes"),
    "string_type": ("must be text", "put it in quotes"),
    "path_type": ("must be a path", "put it in quotes"),
    "list_type": ("must be a list", "write it as [a, b]"),
    "dict_type": ("must be a mapping", "write it as {name: value}"),
    "finite_number": ("must be a finite number", "write an ordinary number"),
    "string_too_short": ("must not be empty", "give it a value or leave the key out"),
}
_BOUNDS = {
    "greater_than": ("gt", "greater than", "a value above {}"),
    "greater_than_equal": ("ge", "at least", "{} or more"),
    "less_than": ("lt", "less than", "a value below {}"),
    "less_than_equal": ("le", "at most", "{} or less"),
}


class _Missing:
    """Stands for the value of a key that is not there."""

    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def field_problems(error: ValidationError, content: Mapping[str, Any]) -> list[Problem]:
    """One problem per field that pydantic refused.

    Args:
        error: The error of validating `content` as a Config; every section is present in it.
        content: The mapping that was validated.
    """
    by_field: dict[tuple[str, ...], list[ErrorDetails]] = {}
    for details in error.errors():
        by_field.setdefault(_setting(details["loc"]), []).append(details)
    return [_field_problem(path, details, content) for path, details in by_field.items()]


def _setting(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The part of pydantic's location that names a setting: section, inner sections, key."""
    model, length = section_models()[str(location[0])], 2
    while (inner := subsection(model, str(location[length - 1]))) and len(location) > length:
        model, length = inner, length + 1
    return tuple(str(name) for name in location[:length])


def _field_problem(
    path: tuple[str, ...], errors: list[ErrorDetails], content: Mapping[str, Any]
) -> Problem:
    """The problem of one field; several errors mean that no alternative of a union fitted."""
    *sections, key = path
    model, holder = section_models()[sections[0]], content[sections[0]]
    for section in sections[1:]:
        inner = subsection(model, section)
        assert inner is not None, f"{section} is no section"
        model, holder = inner, holder[section]
    field, value, name = model.model_fields[key], holder.get(key), ".".join(path)
    # A misspelt key is missing, too.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    entry = _entry_problem(name, field, first, value, len(path))
    if entry is not None:
        return entry
    return _problem(name, field, errors, value, len(errors[0]["loc"]) > len(path))


def _entry_problem(
    name: str, field: FieldInfo, error: ErrorDetails, value: Any, depth: int
) -> Problem | None:
    """The problem of a setting in a list of sections, such as `routing_guard.rules[0].above`."""
    model = next((a for a in get_args(field.annotation) if isinstance(a, type)), None)
    location = error["loc"][depth:]
    if model is None or not issubclass(model, Section) or not location:
        return None
    index = int(location[0])
    name, entry = f"{name}[{index}]", value[index]
    if len(location) == 1:
        return Problem(name, entry, "must be a mapping of keys", "write it as {name: ...}")
    key = str(location[1])
    if error["type"] == "extra_forbidden" and len(location) == 2:
        near = get_close_matches(key, model.model_fields, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(model.model_fields)}"
        return Problem(f"{name}.{key}", entry[key], "is no known key", remedy)
    inner = model.model_fields[key]
    deeper = _entry_problem(f"{name}.{key}", inner, error, entry.get(key), depth + 2)
    if deeper is not None:
        return deeper
    return _problem(f"{name}.{key}", inner, [error], entry.get(key), len(location) > 2)


def _problem(
    name: str, field: FieldInfo, errors: list[ErrorDetails], value: Any, in_list: bool
) -> Problem:
    """The problem of the setting `name`, which is `value`."""
    first = errors[0]
    if first["type"] == "missing":
        section, _, key = name.rpartition(".")
        return Problem(
            name,
            _MISSING,
            f"must be given: {meaning_of(field)}",
            f"add {key} under {section}: or pass {name}=VALUE",
        )
    if first["type"] in ("no_path", "no_plugin"):
        return Problem(name, value, first["ctx"]["rule"], first["ctx"]["remedy"])
    if first["type"] in _BOUNDS:
        return _bound_problem(name, field, first, value)
    if first["type"] == "literal_error":
        return _choice_problem(name, field, value)
    if len(errors) > 1 and isinstance(first["loc"][-1], str):  # the name of an alternative
        return Problem(
            name,
            value,
            "must be a whole number or a list of whole numbers",
            f"write it as {show(field.default)} or as [1, 0]",
        )
    rule, remedy = _TYPES.get(first["type"], (f"is refused: {first['msg']}", meaning_of(field)))
    if first["type"] == "int_type" and isinstance(value, float) and value.is_integer():
        remedy = f"write {int(value)}"
    wants_one = first["type"] not in ("list_type", "dict_type")
    if not in_list and isinstance(value, list | Mapping) and wants_one:
        kind = "list" if isinstance(value, list) else "mapping"
        remedy = f"give one value instead of a {kind}"
    if in_list and first["type"] == "list_type":
        remedy = "write it as [[a, b], [c, d]]"
    if in_list:
        kinds = ("mapping", "value") if isinstance(value, Mapping) else ("list", "entry")
        rule = rule.replace("must be", "must be a {} whose every {} is".format(*kinds))
    return Problem(name, value, rule, remedy or "see the documentation")


def _bound_problem(name: str, field: FieldInfo, error: ErrorDetails, value: Any) -> Problem:
    """A number outside its range; the remedy names the default where there is one."""
    key, relation, advice = _BOUNDS[error["type"]]
    bound = error["ctx"][key]
    if isinstance(value, int) and isinstance(bound, float) and bound.is_integer():
        bound = int(bound)
    remedy = "use " + advice.format(bound)
    if field.default is not None and not field.is_required():
        remedy += f", such as the default {show(field.default)}"
    elif not field.is_required():
        remedy += ", or null"
    return Problem(name, value, f"must be {relation} {bound}", remedy)


def _choice_problem(name: str, field: FieldInfo, value: Any) -> Problem:
    """A value that is none of the named choices; the remedy is the nearest one."""
    choices = _choices(field.annotation)
    shown = [show(choice).strip("'") for choice in choices]
    named = [text for text, choice in zip(shown, choices, strict=True) if choice is not None]
    near = get_close_matches(str(value).lower(), named, n=1, cutoff=0.5)
    plugin = plugin_of(field.annotation)
    if plugin is not None:
        return Problem(name, value, **plugin.refusal(str(value).removeprefix(PREFIX), tuple(named)))
    best = near or ([field.default] if field.default in named else ["null"])
    return Problem(name, value, f"must be one of {', '.join(shown)}", f"use {best[0]}")


def _choices(annotation: Any) -> list[Any]:
    """The values of a Literal, and None where the field may be null."""
    if annotation is type(None):
        return [None]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return list(arguments)
    return [choice for argument in arguments for choice in _choices(argument)]
