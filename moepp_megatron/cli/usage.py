"""Common to all commands: examples at the end of the help, and the refusal of wrong usage."""

from __future__ import annotations

import inspect
import textwrap
from typing import cast

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config.megatron_flags import setting_of

# The base of typer's public exceptions, which is in another module from version to version.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


def move_examples(app: typer.Typer) -> None:
    """Have help end with the docstrings' `Examples:`, one command line a line.

    Args:
        app: A program or a group of commands, whose own text is its `help`.
    """
    app.info.help, app.info.epilog = _without_examples(app.info.help)
    for command in app.registered_commands:
        command.help, command.epilog = _without_examples(command.callback.__doc__)
    for group in app.registered_groups:
        assert group.typer_instance is not None, "a group without commands"
        move_examples(group.typer_instance)


def _without_examples(text: str | None) -> tuple[str, str]:
    text, _, examples = inspect.cleandoc(text or "").partition("\n\nExamples:\n")
    # After a backspace typer keeps the lines as they are.
    return text, f"\b\nExamples:\n{textwrap.indent(textwrap.dedent(examples), '  ')}"


def refuse(error: Exception) -> int:
    """Report what is wrong with a command line, in the form of every other error.

    Args:
        error: A `UsageError`; its message is the help where a group was called alone.

    Returns:
        The exit code.
    """
    context = getattr(error, "ctx", None)
    message: str = error.format_message()  # type: ignore[attr-defined]  # of no public class
    if context is not None and message == context.get_help():
        typer.echo(message, err=True)
        return 2
    path = "moepp" if context is None else context.command_path
    setting = setting_of(str(getattr(error, "option_name", "")))
    hint = "" if setting is None else f"; Megatron's option is the setting {setting}=VALUE here"
    echo(f"error: {' '.join(message.split()).rstrip('.')}{hint}; see {path} --help", err=True)
    return 2
