"""Names of sections and keys: words, names of earlier versions, and unknown ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.megatron_flags import counterpart_of
from moepp_megatron.config.problem import show
from moepp_megatron.config.schema import Section
from moepp_megatron.config.schema.parallel import DEGREES
from moepp_megatron.config.sections import all_sections, section_models, subsection

# Words that mean nothing without their section, so that another section's key is not what was
# meant: `optimizer.name` is not `run.name`.
_WITHOUT_MEANING = frozenset(
    ("decay", "dir", "enabled", "keep", "load", "memory", "mode", "name", "options", "path")
    + ("share", "size", "time", "tokens", "type")
)


def as_current(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mapping of sections as this version has them: no words, no removed settings without effect.

    Raises:
        ConfigError: A word that stands for nothing, in a section that knows some.
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
    """Check the names in a mapping of sections, not their values.

    Args:
        content: Section name to mapping of keys (or to null, an empty section).
        source: Where it came from, for the message.

    Raises:
        ConfigError: An unknown section or key (one line each), or a section that is no mapping.
    """
    lines: list[str] = []
    sections = section_models()
    for section, keys in content.items():
        if section not in sections:
            lines.append(_unknown_section(_one_line(section)))
        else:
            lines += _unknown_keys(section, sections[section], keys)
    if lines:
        raise ConfigError("\n".join(f"{line} (in {source})" for line in lines))


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
