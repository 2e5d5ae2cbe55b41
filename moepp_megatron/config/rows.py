"""Rules as rows: which settings are wrong where, what must hold, and what to write instead.

A rule takes a Config and yields a Problem where it is broken. Texts name settings: `{moe.tau}` is
the value as messages show it, `{moe.tau:g}` the number in that format, `{name}` the setting that
the row is about. What such a text cannot say is a function of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import attrgetter
from string import Formatter
from typing import TYPE_CHECKING, Any

from moepp_megatron.config.problem import Problem, show

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

Rule = Callable[["Config"], Iterator[Problem]]
WorldSizeRule = Callable[["Config", int], Iterator[Problem]]
Condition = Callable[["Config"], object]
Text = str | Callable[["Config"], str]


class _Settings(Formatter):
    """Fills texts with values of settings."""

    def get_value(self, key: int | str, args: Any, kwargs: Any) -> Any:
        """A section, or a property of the whole configuration."""
        return kwargs[key] if key in kwargs else getattr(args[0], str(key))

    def format_field(self, value: Any, format_spec: str) -> str:
        """A value in YAML, but a name without quotes."""
        return format(value, format_spec) if format_spec else _shown(value)


_SETTINGS = _Settings()


def _shown(value: Any) -> str:
    """A value within a sentence: as in YAML, but a name without quotes."""
    return value if isinstance(value, str) else show(value)


def fill(text: Text, config: Config, **names: object) -> str:
    """The text of a row for this configuration; `names` are further names that it may hold."""
    return text(config) if callable(text) else _SETTINGS.vformat(text, (config,), names)


def _problem(config: Config, name: str, value: Any, must: Text, remedy: Text) -> Problem:
    return Problem(name, value, fill(must, config, name=name), fill(remedy, config, name=name))


def refuse(
    names: str, wrong: Condition, must: Text, remedy: Text, value: Condition | None = None
) -> Rule:
    """A rule: each of these settings is refused where `wrong` is true.

    Args:
        names: Dotted names, separated by spaces.
        wrong: Whether the rule is broken.
        must: What must hold instead.
        remedy: What to write.
        value: What messages show as the value; None: the setting's own.
    """

    def rule(config: Config) -> Iterator[Problem]:
        if wrong(config):
            for name in names.split():
                given = (value or attrgetter(name))(config)
                yield _problem(config, name, given, must, remedy)

    return rule


def each(
    items: Callable[[Config], Iterable[tuple[str, Any]]],
    wrong: Callable[[Any], object],
    must: Text,
    remedy: Text,
) -> Rule:
    """A rule: each item, a name and its value, is refused if `wrong` is true of the value."""

    def rule(config: Config) -> Iterator[Problem]:
        for name, value in items(config):
            if wrong(value):
                yield _problem(config, name, value, must, remedy)

    return rule


def values(names: str) -> Callable[[Config], list[tuple[str, Any]]]:
    """The items of `each`: settings, dotted names with spaces between them."""
    return lambda config: [(name, attrgetter(name)(config)) for name in names.split()]


def entries(name: str) -> Callable[[Config], list[tuple[str, Any]]]:
    """The items of `each`: what a list holds, or the names in a mapping."""
    return lambda config: [(name, entry) for entry in attrgetter(name)(config)]


def group(applies: Condition, *rules: Rule) -> Rule:
    """Rules that must hold only where `applies` is true."""

    def rule(config: Config) -> Iterator[Problem]:
        if applies(config):
            for member in rules:
                yield from member(config)

    return rule


def first(*rules: Rule) -> Rule:
    """Rules of which each relies on those before it: only the first broken one is reported."""

    def rule(config: Config) -> Iterator[Problem]:
        problems = (list(member(config)) for member in rules)
        yield from next(filter(None, problems), [])

    return rule


def table[T](*members: T) -> tuple[T, ...]:
    """The rows that a section declares, as a tuple of any length, which those of bases are too."""
    return members


def no_effect_where(applies: Condition, reason: str, names: str, remedy: str) -> Rule:
    """A rule: none of `names` (one or more, with spaces) has an effect where `applies` is true."""
    rules = (
        refuse(name, partial(_is_set, name), f"has no effect {reason}", remedy)
        for name in names.split()
    )
    return group(applies, *rules)


def _is_set(name: str, config: Config) -> bool:
    """True if the user set it to something other than its default."""
    section, _, key = name.rpartition(".")
    return bool(attrgetter(section)(config).is_set(key))


def no_effect_with(switch: str, value: Any, names: str, remedy: str) -> Rule:
    """A rule: none of `names` has an effect with this value of another setting."""
    value_of, remedy = attrgetter(switch), f"{remedy}, or leave it out"
    reason = f"with {switch} {_shown(value)}"
    return no_effect_where(lambda c: value_of(c) == value, reason, names, remedy)


def no_effect_without(switch: str, names: str, remedy: str) -> Rule:
    """A rule: none of `names` has an effect without another setting, or without a value of it."""
    setting, _, value = switch.partition(" ")
    value_of, remedy = attrgetter(setting), f"{remedy}, or leave it out"

    def is_missing(config: Config) -> bool:
        return value_of(config) != value if value else not value_of(config)

    return no_effect_where(is_missing, f"without {switch}", names, remedy)
