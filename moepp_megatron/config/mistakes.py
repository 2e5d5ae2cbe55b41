"""Names and values in a mapping of sections: what is unknown, of earlier versions, or refused."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moepp_megatron.config.errors import ConfigError, Problem, raise_problems, show
from moepp_megatron.config.megatron_flags import counterpart_of
from moepp_megatron.config.plugins import PREFIX, plugin_of
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.config.schema.parallel import DEGREES
from moepp_megatron.config.schema.section import meaning_of
from moepp_megatron.config.sections import all_sections, section_models, subsection

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

# Words that mean nothing without their section, so that another section's key is not what was
# meant: `optimizer.name` is not `run.name`.
_WITHOUT_MEANING = frozenset(
    ("decay", "dir", "enabled", "keep", "load", "memory", "mode", "name", "options", "path")
    + ("share", "size", "time", "tokens", "type")
)


def as_current(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return sections as this version has them: no words, no removed settings without effect.

    ConfigError for a word that stands for nothing, in a section that knows some.
    """
    result = dict(content)
    for section, model in section_models().items():
        value = result.get(section)
        # `off` without quotes is false in YAML.
        word = "off" if value is False else value
        if model.shorthand and isinstance(word, str):
            value = _keys_of(section, word, model.shorthand)
        if isinstance(value, Mapping):
            result[section] = model.current(value)
    return result


def _keys_of(section: str, word: str, words: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if word not in words:
        near = get_close_matches(word, words, n=1) or list(words)
        raise ConfigError(
            f"{section} ({show(word)}) must be a mapping of keys or one of {', '.join(words)}; "
            f"use {near[0]}"
        )
    return words[word]


def refuse_unknown_keys(content: Mapping[Any, Any], source: str) -> None:
    """Check the names in a mapping of sections, not their values; a section may be null.

    ConfigError has a line, naming `source`, for each unknown name or section that is no mapping.
    """
    lines: list[str] = []
    sections = section_models()
    for section, keys in content.items():
        if section not in sections:
            lines.append(_unknown_section(_one_line(section)))
        else:
            lines += _unknown_keys(section, sections[section], keys)
    raise_problems(f"{line} (in {source})" for line in lines)


def _unknown_keys(path: str, model: type[Section], keys: Any) -> Iterator[str]:
    """The problems of the names in one section and in the sections inside it."""
    if keys is None:
        return
    if not isinstance(keys, Mapping):
        first = next(iter(model.model_fields))
        yield (
            f"{path} must be a mapping of keys, not {show(keys)}; "
            f"write {path}: with indented keys below, or {path}.{first}=VALUE"
        )
        return
    for key, value in keys.items():
        if key in model.removed:
            given = "" if value is None else f" ({show(value)})"
            yield f"{path}.{key}{given} has been removed; {model.removed[key][1]}"
        elif key not in model.model_fields:
            yield _unknown_key(path, model, _one_line(key))
        elif (inner := subsection(model, key)) is not None:
            yield from _unknown_keys(f"{path}.{key}", inner, value)


def nearest_setting(text: str) -> str | None:
    """The section or setting whose name, or the end of it, is most like `text`, if any is."""
    names: dict[str, str] = {}
    for path, model in all_sections():
        for name in model.model_fields:
            names[name] = names[f"{path}.{name}"] = f"{path}.{name}"
        names[path] = path
    near = [names[name] for name in get_close_matches(text, names, n=1, cutoff=0.7)]
    return counterpart_of(text) or next(iter(near), None)


def _unknown_section(section: str) -> str:
    """The message for a section that does not exist."""
    sections = section_models()
    near = get_close_matches(section, sections, n=1)
    if near:
        return f"unknown section {section}; did you mean {near[0]}?"
    owners = [name for name, model in sections.items() if section in model.model_fields]
    if owners:
        return f"unknown section {section}; did you mean the key {owners[0]}.{section}?"
    return f"unknown section {section}; the sections are {', '.join(sections)}"


def _unknown_key(path: str, own: type[Section], key: str) -> str:
    """Name a similar key of the section, and one of exactly this name in another section."""
    near = [f"{path}.{name}" for name in _close(key, own, 0.7)[:1]]
    # Megatron's name for it says more than a similar one.
    of_megatron = counterpart_of(key)
    if of_megatron is not None and not of_megatron.endswith(f".{key}"):
        near = [of_megatron]
    if key in DEGREES:
        near = [f"parallel.{DEGREES[key]}"]
    others = {name: model for name, model in all_sections() if name != path}
    if key not in _WITHOUT_MEANING:
        near += [f"{name}.{key}" for name, model in others.items() if key in model.model_fields][:1]
        # Otherwise only a slip of a letter or two counts, else the list helps more.
        for other, model in () if near else others.items():
            near += [f"{other}.{name}" for name in _close(key, model, 0.85)]
            near = near[:1]
    if near:
        return f"unknown key {path}.{key}; did you mean {' or '.join(near)}?"
    return f"unknown key {path}.{key}; {path} has {', '.join(own.model_fields)}"


def _close(key: str, model: type[Section], cutoff: float) -> list[str]:
    """Names of `model` that look like `key`, or contain it from a word on (top_k: router_topk)."""
    names = list(model.model_fields)
    bare = key.replace("_", "")
    containing = [name for name in names if len(bare) > 2 and _has_word(name, bare)]
    return get_close_matches(key, names, n=1, cutoff=cutoff) or containing


def _has_word(name: str, bare: str) -> bool:
    """True if `bare` begins where a word of `name` does, underscores left out."""
    words = name.split("_")
    return any("".join(words[i:]).startswith(bare) for i in range(len(words)))


def _one_line(key: Any) -> str:
    """A key as text, on one line whatever it holds."""
    return " ".join(str(key).split())


class _Place(NamedTuple):
    """The setting that pydantic's location names."""

    setting: str  # Its dotted name, or that of the list of sections that it is in.
    name: str  # With the number of the entry, such as `routing_guard.rules[0].above`.
    field: FieldInfo | None  # None for an entry of a list of sections, and for an unknown key.
    model: type[Section]  # The section that it is in, or would be.
    value: Any
    is_inside: bool  # Whether the location continues: a list, a mapping, a union's alternative.


def _place(location: tuple[int | str, ...], content: Mapping[str, Any]) -> _Place:
    model: type[Section] = Config
    setting = name = ""
    field: FieldInfo | None = None
    inner, value = model, cast(Any, content)
    for depth, part in enumerate(location, 1):
        if isinstance(part, int):
            setting, name, field, value = setting or name, f"{name}[{part}]", None, value[part]
            continue
        model, name = inner, f"{name}.{part}".lstrip(".")
        field, value = model.model_fields.get(part), value.get(part)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        if not sections:
            return _Place(setting or name, name, field, model, value, depth < len(location))
        inner = sections[0]
    return _Place(setting or name, name, field, inner, value, False)


def field_problems(error: ValidationError, content: Mapping[str, Any]) -> list[Problem]:
    """Return one problem per field refused when `content` was validated as a Config.

    Every section must be present in `content`.
    """
    by_setting: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_setting.setdefault(_place(details["loc"], content).setting, []).append(details)
    return [_field_problem(details, content) for details in by_setting.values()]


def _field_problem(errors: list[ErrorDetails], content: Mapping[str, Any]) -> Problem:
    """The problem of one field; several errors mean that no alternative of a union fitted."""
    # A misspelt key is missing, too.
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    at, key = _place(first["loc"], content), first["loc"][-1]
    if at.field is not None:
        alternatives = errors if at.name == at.setting else [first]
        return _problem(at.name, at.field, alternatives, at.value, at.is_inside)
    if isinstance(key, int):
        return Problem(at.name, at.value, "must be a mapping of keys", "write it as {name: ...}")
    known = at.model.model_fields
    near = get_close_matches(key, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
    return Problem(at.name, at.value, "is no known key", remedy)


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
