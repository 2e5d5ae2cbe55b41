"""Loads a checked Config from YAML files and overrides, and tells where each value comes from."""

import datetime
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moepp_megatron.config.checks import check_config
from moepp_megatron.config.errors import ConfigError, raise_problems
from moepp_megatron.config.mistakes import as_current, field_problems, refuse_unknown_keys
from moepp_megatron.config.schema import Config, Section
from moepp_megatron.config.sections import all_sections, is_optional, section_models, subsection
from moepp_megatron.config.yaml_file import parse_yaml, read_mapping

Content = dict[str, Any]
_COMMAND_LINE = "command line"
"""The origin of overrides in `config_layers`."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load, merge, validate and check a configuration.

    `path` is a YAML file; its `base:` names a file to start from, relative to the file naming it.
    `overrides` are `section.key=value`, the value as YAML; later ones win. ConfigError has one line
    per problem, and no other error is raised.
    """
    layers = (layer for _, layer in config_layers(path, overrides))
    return parse_config(reduce(_merge, layers, {}))


def config_layers(path: str | Path, overrides: Sequence[str] = ()) -> list[tuple[str, Content]]:
    """List the layers of a configuration, checked only for names; later ones win.

    A layer is its origin, a file's path or `command line`, and its sections: the lowest base first,
    then the file, then the overrides in their order. ConfigError if one cannot be read.
    """
    # A path of object storage stays one.
    file = path if isinstance(path, Path) else Path(path)
    _refuse_settings_first(file, overrides)
    overriding = [(_COMMAND_LINE, _overriding(override)) for override in overrides]
    return [*_read_with_bases(file, chain=()), *overriding]


def parse_config(content: Mapping[str, Any]) -> Config:
    """Validate and check a mapping of sections; ConfigError has one line per problem."""
    config = validated(content)
    check_config(config)
    return config


def validated(content: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Return a configuration of valid keys, types and ranges; cross-field rules are not checked.

    It may describe another trainer's run (`plan --measured`). ConfigError has one line per problem.
    """
    content = as_current(content)
    refuse_unknown_keys(content, source)
    # Absent sections are added empty, so that a missing field is reported by its own name.
    filled = {
        section: _without_empty(model, content.get(section))
        for section, model in section_models().items()
    }
    try:
        config = Config.model_validate(filled)
    except ValidationError as error:
        raise_problems(field_problems(error, filled))
        raise AssertionError("a ValidationError without problems") from error
    return config


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a copy with overrides applied and checked; errors are those of `load_config`."""
    content = config.model_dump(mode="json", exclude_unset=True)
    return parse_config(_merge(content, overriding_sections(overrides)))


def overriding_sections(overrides: Sequence[str]) -> Content:
    """Return the sections that overrides set; later ones win. ConfigError if one cannot be read."""
    return reduce(_merge, map(_overriding, overrides), {})


def parse_override(override: str) -> tuple[str, str, Any]:
    """Split `section.key=value` into section, key and the value, read as YAML.

    The key is dotted where it lies in a section inside that section. ConfigError if the override is
    not of this form, or names an unknown section or key.
    """
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if section and not dot:
        # `tau=1` is likelier to lack its section than to be a mistake of form.
        refuse_unknown_keys({section: None}, f"override {override!r}")
    if not (equals and dot and section and key):
        raise ConfigError(
            f"override {override!r} must have the form section.key=value; "
            "write for example moe.tau=0.5"
        )
    refuse_unknown_keys(nested([(name.strip().split("."), None)]), f"override {override!r}")
    if not text.strip():
        # An unset shell variable would otherwise quietly become null.
        raise ConfigError(
            f"override {override!r} must give a value after '='; write the value, or null for none"
        )
    value = parse_yaml(text, f"override {override!r}")
    if isinstance(value, (int, float, datetime.date)) and _is_text(section, key):
        # 4:00:00 is a number of YAML's, and quotes do not get past a shell.
        value = text.strip()
    return section, key, value


def _is_text(section: str, name: str) -> bool:
    """True if a setting is text or a path, and not a number."""
    path, _, key = f"{section}.{name}".rpartition(".")
    annotation = dict(all_sections())[path].model_fields[key].annotation
    kinds = set(get_args(annotation) or (annotation,)) - {type(None)}
    return kinds <= {str, Path}


def _refuse_settings_first(path: Path, overrides: Sequence[str]) -> None:
    """Refuse `section.key=value` where the file should be."""
    section = str(path).partition(".")[0]
    if "=" not in str(path) or section not in section_models() or path.exists():
        return
    file = next((word for word in overrides if "=" not in word), "CONFIG")
    words = [file, str(path), *(word for word in overrides if word != file)]
    raise ConfigError(
        f"CONFIG ({path}) must be a YAML file, and is a setting; write the file first: "
        f"{shlex.join(words)}"
    )


def _read_with_bases(path: Path, chain: tuple[str, ...]) -> list[tuple[str, Content]]:
    """Read a file and its bases: the lowest first; `chain` are the files that led here."""
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: cannot be read (no path holds a zero byte); give a file")
    resolved = os.path.realpath(str(path))
    if resolved in chain:
        names = " -> ".join([*chain[chain.index(resolved) :], resolved])
        raise ConfigError(f"base: goes in a circle: {names}; remove one of these base: lines")
    content = read_mapping(path)
    base = content.pop("base", None)
    content = as_current(content)
    refuse_unknown_keys(content, str(path))
    own: Content = {section: keys or {} for section, keys in content.items()}
    if base is None:
        return [(str(path), own)]
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"base ({base!r}) in {path} must be the path of one file; write base: other.yaml"
        )
    base_path = path.parent / os.path.expanduser(base)
    if not base_path.exists():
        raise ConfigError(
            f"base ({base!r}) in {path} must name a file, and {base_path} is none; "
            "give a path relative to the file that names it"
        )
    return [*_read_with_bases(base_path, (*chain, resolved)), (str(path), own)]


def _overriding(override: str) -> Content:
    """The content of an override: one key, or a section by its shorthand (`routing_guard=safe`)."""
    name, equals, text = override.partition("=")
    model = section_models().get(name.strip())
    if equals and model is not None and model.shorthand:
        return as_current({name.strip(): parse_yaml(text, f"override {override!r}")})
    section, key, value = parse_override(override)
    return nested([([section, *key.split(".")], value)])


def from_dotted(settings: Mapping[str, Any]) -> Content:
    """Nest `section.key: value` pairs; later keys win. ConfigError for a name without a section."""
    content: Content = {}
    for name, value in settings.items():
        section, dot, key = str(name).partition(".")
        if not (section and dot and key):
            raise ConfigError(
                f"setting {name!r} must have the form section.key; write for example moe.tau"
            )
        content = _merge(content, nested([(name.split("."), value)]))
    return content


def nested(values: Iterable[tuple[Sequence[str], Any]]) -> Content:
    """The sections that hold values, each given with its names from the section inwards."""
    content: Content = {}
    for (*sections, name), value in values:
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return content


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Sections key by key, `over` first; a list or null replaces what the base had."""
    merged = dict(base)
    for name, value in over.items():
        below = merged.get(name)
        if isinstance(value, Mapping):
            value = _merge(below if isinstance(below, Mapping) else {}, value)
        merged[name] = value
    return merged


def _without_empty(model: type[Section], keys: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy in which a section without keys, null in YAML, is an empty mapping."""
    filled = dict(keys or {})
    for name, value in filled.items():
        inner = subsection(model, name)
        if inner is not None and not (value is None and is_optional(model, name)):
            filled[name] = _without_empty(inner, value)
    return filled


DEFAULT = "default"


def config_with_origins(
    path: str | Path, overrides: Sequence[str] = ()
) -> list[tuple[tuple[str, ...], Any, str]]:
    """List the resolved settings: names from the section inwards, value as JSON has it, and origin.

    The origin is a file's path, `command line` or `default`; a list is one value. ConfigError if
    anything is wrong with the configuration.
    """
    values = load_config(path, overrides).model_dump(mode="json")
    origins: dict[tuple[str, ...], str] = {}
    for origin, content in config_layers(path, overrides):
        origins |= dict.fromkeys((names for names, _ in leaves(content)), origin)
    return [(names, value, origins.get(names, DEFAULT)) for names, value in leaves(values)]


def leaves(
    content: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values in a mapping of mappings, each with its names from the outside in."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value
