"""Rules as rows: which settings are wrong where, what must hold, and what to write instead.

A rule takes a Config and yields a Problem where it is broken. Texts name settings: `{moe.tau}` is
the value as messages show it, `{moe.tau:g}` the number in that format, `{name}` the setting that
the row is about. What such a text cannot say is a function of the configuration.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import gcd, isqrt
from operator import attrgetter
from string import Formatter
from typing import TYPE_CHECKING, Any

from moepp_megatron.config.errors import Problem, show

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

Rule = Callable[["Config"], Iterator[Problem]]
WorldSizeRule = Callable[["Config", int], Iterator[Problem]]
Question = Callable[["Config"], object]
# A function, or text: `moe.is_vanilla` is true of a setting or property that is neither null nor 0
# nor empty, `moe.dispatcher flex` where it has this value; `not` may stand before, ` and ` between.
Condition = str | Question
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


def refuse(
    names: str, wrong: Condition, must: Text, remedy: Text, value: Question | None = None
) -> Rule:
    """Return a rule that refuses each of these settings where `wrong` is true.

    `names` are dotted, separated by spaces. `must` says what must hold instead, `remedy` what to
    write, and `value` what messages show as the value, the setting's own where None.
    """

    def items(config: Config) -> list[tuple[str, Any]]:
        return [(name, (value or attrgetter(name))(config)) for name in names.split()]

    return group(wrong, each(items, lambda _: True, must, remedy))


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
                texts = (fill(text, config, name=name) for text in (must, remedy))
                yield Problem(name, value, *texts)

    return rule


def values(names: str) -> Callable[[Config], list[tuple[str, Any]]]:
    """The items of `each`: settings, dotted names with spaces between them."""
    return lambda config: [(name, attrgetter(name)(config)) for name in names.split()]


def entries(name: str) -> Callable[[Config], list[tuple[str, Any]]]:
    """The items of `each`: what a list holds, or the names in a mapping."""
    return lambda config: [(name, entry) for entry in attrgetter(name)(config)]


def group(applies: Condition, *rules: Rule) -> Rule:
    """Rules that must hold only where `applies` is true."""
    terms = [applies] if callable(applies) else applies.split(" and ")

    def rule(config: Config) -> Iterator[Problem]:
        if all(_holds(term, config) for term in terms):
            for member in rules:
                yield from member(config)

    return rule


def _holds(term: Condition, config: Config) -> object:
    if callable(term):
        return term(config)
    name, _, wanted = term.removeprefix("not ").partition(" ")
    value = attrgetter(name)(config)
    return (_shown(value) == wanted if wanted else bool(value)) is not term.startswith("not ")


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
    remedy = f"{remedy}, or leave it out"
    return no_effect_where(f"not {switch}", f"without {switch}", names, remedy)


_MOST_DIVISORS = 8


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` just below and above `value`, as "4 or 8"."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _legal_divisors(value: int, near: int) -> str:
    """The divisors of `value`, as "1, 2, 4 or 8"; of many only the two on either side of `near`."""
    divisors = [number for number in range(1, isqrt(value) + 1) if value % number == 0]
    divisors = sorted({*divisors, *(value // number for number in divisors)})
    if len(divisors) > _MOST_DIVISORS:
        place = bisect(divisors, near)
        divisors = divisors[max(place - 2, 0) : place + 2]
    *others, last = map(str, divisors)
    return f"{', '.join(others)} or {last}" if others else last


def must_divide(
    name: str,
    value: int,
    divisor: int,
    divisor_text: str,
    reason: str = "",
    others: Sequence[int] | None = None,
) -> Iterator[Problem]:
    """Yield a problem unless `divisor` divides `value`, which is that of the setting `name`.

    `divisor_text` is the divisor in words, or the name of its setting; `reason` is added to the
    rule where that does not explain itself. `others` are the other values that the divisor has to
    divide, if it is a setting that the user may change as well: the remedy then names its legal
    values first.
    """
    if value % divisor == 0:
        return
    remedy = f"use {nearest_multiples(value, divisor)}"
    if others is not None:
        legal = _legal_divisors(gcd(value, *others), divisor)
        remedy = f"set {divisor_text} to {legal}, or for {name} {remedy}"
        divisor_text += f" ({divisor})"
    yield Problem(name, value, f"must be divisible by {divisor_text}{reason}", remedy)


def divisible(
    name: str,
    divisor: Callable[[Config], int],
    divisor_text: Text,
    others: Sequence[int] | None = None,
) -> Rule:
    """A rule: `divisor` must divide this setting; the texts as in `must_divide`."""
    return lambda config: must_divide(
        name, attrgetter(name)(config), divisor(config), fill(divisor_text, config), others=others
    )


def batch_sizes(config: Config) -> list[tuple[str, int]]:
    """Each number of sequences that a step of the run has, and the setting that gives it."""
    training = config.training
    sizes = [("training.global_batch_size", training.global_batch_size)]
    if training.batch_ramp is not None:
        sizes += [("training.batch_ramp", size) for size in training.batch_sizes[:-1]]
    return sizes
