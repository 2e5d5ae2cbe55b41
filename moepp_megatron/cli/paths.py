"""Every path of the command line is checked in one place, before a command sees it."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from moepp_megatron.config import ConfigError
from moepp_megatron.config.paths import path_problem
from moepp_megatron.config.problem import Problem


def check_paths(app: typer.Typer) -> None:
    """Have the commands of `app` refuse what is no path of this machine, such as s3://."""
    for command in app.registered_commands:
        assert command.callback is not None, "a command without a function"
        command.callback = _checked(command.callback)
    for group in app.registered_groups:
        assert group.typer_instance is not None, "a group without commands"
        check_paths(group.typer_instance)


def _checked(command: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(command)
    def call(**arguments: Any) -> Any:
        for name, value in arguments.items():
            for one in value if isinstance(value, list) else [value]:
                problem = path_problem(str(one)) if isinstance(one, Path) else None
                if problem is not None:
                    shown = Problem(_shown(command, name), str(one), problem.rule, problem.remedy)
                    raise ConfigError(str(shown))
        return command(**arguments)

    return call


def _shown(command: Callable[..., Any], name: str) -> str:
    """What the user calls a parameter: --out, or CHECKPOINT."""
    hint = typing.get_type_hints(command, include_extras=True)[name]
    for extra in getattr(hint, "__metadata__", ()):
        if type(extra).__name__ == "OptionInfo":
            # Inside Annotated typer takes the first name for the default, and mends it later.
            words = (extra.default, *(extra.param_decls or ()))
            named = [word for word in words if isinstance(word, str) and word.startswith("--")]
            return named[0] if named else f"--{name.replace('_', '-')}"
    return name.upper()
