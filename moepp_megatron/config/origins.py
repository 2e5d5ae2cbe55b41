"""Says where each value of a configuration comes from: a file, the command line or the defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.config.load import config_layers, load_config

DEFAULT = "default"


def config_with_origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration, each value with its origin.

    Args:
        path: YAML file.
        overrides: `section.key=value`.

    Returns:
        Sections as in the file; each setting is a pair of its resolved value, as JSON has it, and
        its origin: a file's path, `command line` or `default`. A list is one value.

    Raises:
        ConfigError: If anything is wrong with the configuration.
    """
    config = load_config(path, overrides)
    origins: dict[tuple[str, ...], str] = {}
    for origin, content in config_layers(path, overrides):
        origins |= dict.fromkeys((names for names, _ in leaves(content)), origin)
    return _paired(config.model_dump(mode="json"), origins, ())


def leaves(
    content: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values in a mapping of mappings, each with its names from the outside in."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _paired(
    content: Mapping[str, Any], origins: Mapping[tuple[str, ...], str], above: tuple[str, ...]
) -> dict[str, Any]:
    paired: dict[str, Any] = {}
    for name, value in content.items():
        here = (*above, name)
        if isinstance(value, Mapping) and value:
            paired[name] = _paired(value, origins, here)
        else:
            paired[name] = (value, origins.get(here, DEFAULT))
    return paired
