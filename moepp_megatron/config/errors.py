"""The two errors that a user can cause, and the form of their messages."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moepp_megatron.config.exit_codes import REFUSED, UNFIT
from moepp_megatron.config.paths import without_password


class ConfigError(ValueError):
    """The configuration or the usage is wrong.

    The message has one line per problem, each with name, value, rule and remedy. The command line
    prints it without a traceback and exits with `exit_code`.
    """

    exit_code = REFUSED


class UnfitError(RuntimeError):
    """The configuration is valid, but this machine cannot run it (no GPU, missing package)."""

    exit_code = UNFIT


_LONGEST_VALUE = 60


def show(value: Any) -> str:
    """Return a value as in YAML (null, true, quoted text), cut if long, without passwords."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        value = [str(entry) if isinstance(entry, Path) else entry for entry in value]
    text = without_password(repr(str(value) if isinstance(value, Path) else value))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


@dataclass(frozen=True)
class Problem:
    """A broken rule: a setting's dotted name and value, what must hold, and what to write instead.

    `rule` starts with "must".
    """

    name: str
    value: Any
    rule: str
    remedy: str

    def __str__(self) -> str:
        """`name (value) rule; remedy`, on one line whatever the value holds."""
        return f"{self.name} ({show(self.value)}) {self.rule}; {self.remedy}"


def first_misfit(error: ValidationError) -> tuple[str, str]:
    """Return the dotted key that pydantic refused first, "" for all of it, and the reason."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(map(str, first["loc"])), first["msg"]


def raise_problems(problems: Iterable[Problem | str]) -> None:
    """Raise one ConfigError with a line for each problem, if there is any."""
    lines = [str(problem) for problem in problems]
    if lines:
        raise ConfigError("\n".join(lines))
