"""Sections that one word stands for, such as `routing_guard: safe`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.problem import show

WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "routing_guard": {
        "safe": {"enabled": True, "dry_run": False},
        "observe": {"enabled": None},
        "off": {"enabled": False},
    }
}


def expanded(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mapping of sections in which words are the settings that they stand for.

    Raises:
        ConfigError: A word that stands for nothing, in a section that knows some.
    """
    result = dict(content)
    for section, words in WORDS.items():
        value = result.get(section)
        # `off` without quotes is false in YAML.
        word = "off" if value is False else value
        if not isinstance(word, str):
            continue
        if word not in words:
            near = get_close_matches(word, words, n=1) or list(words)
            raise ConfigError(
                f"{section} ({show(word)}) must be a mapping of keys or one of {', '.join(words)}; "
                f"use {near[0]}"
            )
        result[section] = dict(words[word])
    return result
