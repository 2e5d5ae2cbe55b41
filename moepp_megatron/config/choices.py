"""Reads values that must be one of several: names in registries, comma-separated options."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.plugins import PREFIX, load_plugin


def pick[T](registry: Mapping[str, T], setting: str, name: str, plugins: str | None = None) -> T:
    """Look up `name`, the value of `setting`, in a registry, then among installed plugins.

    `plugins` is the kind of plugin that `plugin:NAME` may name; None allows none. ConfigError lists
    the registry's names where `name` is not among them.
    """
    if plugins is not None and name.startswith(PREFIX):
        plugin: T = load_plugin(plugins, setting, name)
        return plugin
    if name not in registry:
        known = ", ".join(registry)
        raise ConfigError(f"{setting} ({name}) must be one of {known}; use one of these")
    return registry[name]


def parse_choices(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Parse names out of `known`, each once, in order; ConfigError if none, or an unknown one."""
    names = list(dict.fromkeys(_parts(text)))
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{option} ({name}) must be one of {', '.join(known)}{hint}")
    if not names:
        raise ConfigError(f"{option} ({text!r}) must name at least one of {', '.join(known)}")
    return names


def parse_numbers(
    option: str, text: str, rule: str, holds: Callable[[float], bool], example: str = "0.75"
) -> list[float]:
    """Parse numbers, each once, in the order given.

    `rule` says in words what `holds` tests of each number, and messages suggest `example`.
    ConfigError names `option` if a part is not a number or breaks the rule, or there is none.
    """
    numbers = []
    for part in _parts(text):
        try:
            number = float(part)
        except ValueError:
            number = float("nan")
        if not holds(number):
            raise ConfigError(
                f"{option} ({part}) must be {rule}; use for example {option} {example}"
            )
        numbers.append(number)
    if not numbers:
        raise ConfigError(
            f"{option} ({text!r}) must hold {rule}; use for example {option} {example}"
        )
    return list(dict.fromkeys(numbers))


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_counts(option: str, text: str) -> list[int]:
    """Parse whole numbers above 0, each once, ascending; ConfigError for anything else or none."""
    rule = "a whole number above 0"
    numbers = parse_numbers(option, text, rule, lambda n: n >= 1 and n.is_integer(), "1,2,4")
    return sorted(map(int, numbers))
