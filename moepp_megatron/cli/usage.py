"""Common to all commands: the list of commands in help, and the refusal of wrong usage."""

from __future__ import annotations

from typing import Any, cast

import typer
from typer.core import TyperGroup

from moepp_megatron.cli.echo import echo
from moepp_megatron.config.megatron_flags import setting_of

# The base of typer's public exceptions, which is in another module from version to version.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])


class _Commands(TyperGroup):
    """A command with subcommands, whose help gives the first sentence of each in full."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list, wrapped where click would cut each line."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        shown = {name: command for name, command in commands.items() if command is not None}
        with formatter.section("Commands"):
            formatter.write_dl([(name, first_sentence(c.help)) for name, c in shown.items()])


COMMANDS: dict[str, Any] = {"cls": _Commands}
"""For typer, of a command with commands in it."""


def first_sentence(text: str | None) -> str:
    """The first sentence of a help text, in one line."""
    paragraph = " ".join((text or "").split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + "." if stop else paragraph


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
