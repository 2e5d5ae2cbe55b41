"""Reads the arguments of a Megatron-LM run from a file. Nothing in it is executed.

The file is a shell script with arguments in the call or in arrays, or YAML with a mapping of
arguments (`MODEL_ARGS:` with keys such as `--num-layers`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.config.yaml_file import parse_yaml

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")

Arguments = dict[str, str]


def read_arguments(path: Path, variables: Mapping[str, str]) -> Arguments:
    """The arguments by their names without dashes, those of several words with spaces.

    Args:
        path: The file.
        variables: Values of its variables; they win over those in it. Unknown ones stay.

    Raises:
        ConfigError: The file cannot be read.
    """
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ConfigError(f"FILE ({path}) cannot be read ({reason}); give a text file") from None
    is_yaml = path.suffix in (".yaml", ".yml")
    arguments = _from_yaml(text, path) if is_yaml else _from_shell(text, path, dict(variables))
    return {name: _expand(value, variables) for name, value in arguments.items()}


def _from_yaml(text: str, path: Path) -> Arguments:
    """All keys that begin with `--`, wherever they are nested."""
    parsed: Arguments = {}
    waiting = [parse_yaml(text, str(path))]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, Mapping):
            continue
        for key, inner in value.items():
            if not str(key).startswith("--"):
                waiting.append(inner)
            elif inner is not False:
                words = inner if isinstance(inner, list) else [inner]
                parsed[_name(str(key))] = " ".join("true" if w is True else str(w) for w in words)
    return parsed


def _from_shell(text: str, path: Path, variables: dict[str, str]) -> Arguments:
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    parsed: Arguments = {}
    current: str | None = None
    try:
        for word in lexer:
            assignment = _ASSIGNMENT.fullmatch(word)
            if assignment is not None and assignment[2]:
                variables.setdefault(assignment[1], _expand(assignment[2], variables))
            if word.startswith("--"):
                name, _, value = word.partition("=")
                current = _name(name)
                parsed[current] = _expand(value, variables)
            elif assignment is not None or set(word) <= set("();|&") or not _is_value(word):
                current = None
            elif current is not None:
                parsed[current] = f"{parsed[current]} {_expand(word, variables)}".strip()
    except ValueError as error:
        raise ConfigError(
            f"FILE ({path}) must be a shell script that can be read ({error}); give one with all "
            "quotes closed"
        ) from None
    return {name: value or "true" for name, value in parsed.items()}


def _is_value(word: str) -> bool:
    """Whether a word can be an argument's value: no program, no command in quotes."""
    return not (word.endswith(".py") or "\n" in word)


def _name(option: str) -> str:
    return option.lstrip("-").replace("_", "-")


def _expand(text: str, variables: Mapping[str, str]) -> str:
    """Put in the variables that are known; the others stay."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        known = variables.get(name, match[2])
        return match[0] if known is None else known

    return _VARIABLE.sub(value, text)
