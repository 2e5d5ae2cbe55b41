"""Common to all commands: help in a user's words, and the refusal of wrong usage."""

from __future__ import annotations

import re
import textwrap
from typing import Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from moepp_megatron.cli.echo import echo
from moepp_megatron.config.megatron_flags import setting_of
from moepp_megatron.runtime.patches import replace

# The base of typer's public exceptions, which is in another module from version to version.
UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])

# What typer shows of a type, `<int range>`, and what a user writes; other types need a metavar.
_TYPE = re.compile(r" <(.+)>$")
_VALUES = {"int": "N", "int range": "N", "float": "NUMBER", "float range": "NUMBER"}
_RANGE = re.compile(r"(?:([\d.]+)<=)?x([<>])=([\d.]+)(?=[;\]])")
_EXAMPLES = "\n\nExamples:\n"


class _Explained:
    """A command whose help has the words of a user, and examples at its end.

    The examples are the last section of a command's docstring, `Examples:`, one command line a
    line. They keep their lines and become the command's `epilog`.
    """

    epilog: str | None

    def __init__(self, *args: Any, help: str | None = None, **settings: Any) -> None:
        text, _, examples = (help or "").partition(_EXAMPLES)
        settings["epilog"] = textwrap.dedent(examples).strip()
        super().__init__(*args, help=text, **settings)  # type: ignore[call-arg]  # a mixin
        for parameter in settings["params"]:
            _explain(parameter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each of them in one line however narrow the terminal is."""
        if self.epilog:
            with formatter.section("Examples"):
                formatter.write(textwrap.indent(f"{self.epilog}\n", " " * formatter.current_indent))


class Command(_Explained, TyperCommand):
    """A command."""


class _Commands(_Explained, TyperGroup):
    """A command with subcommands, whose help gives the first sentence of each in full."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list, wrapped where click would cut each line."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        shown = {name: command for name, command in commands.items() if command is not None}
        with formatter.section("Commands"):
            formatter.write_dl([(name, first_sentence(c.help)) for name, c in shown.items()])


COMMANDS: dict[str, Any] = {"cls": _Commands}
"""For typer, of a command with commands in it."""


def explain_commands(app: typer.Typer) -> None:
    """Give the commands of `app` help in a user's words."""
    for command in app.registered_commands:
        if not issubclass(command.cls or TyperCommand, Command):
            command.cls = Command
    for group in app.registered_groups:
        assert group.typer_instance is not None, "a group without commands"
        explain_commands(group.typer_instance)


def _explain(parameter: Any) -> None:
    """Have an argument or option show `N` and "at least 1", not `<int range>` and `x>=1`."""
    record, pieces = parameter.get_help_record, parameter.get_usage_pieces
    is_argument = parameter.param_type_name == "argument"

    def shown(ctx: Any) -> tuple[str, str] | None:
        found = record(ctx)
        if found is None:
            return None
        name = _TYPE.sub("" if is_argument else _value, found[0])
        return name, _RANGE.sub(_range_in_words, found[1])

    replace(parameter, "get_help_record", shown)
    # `CONFIG`, where typer has `{CONFIG}`.
    replace(
        parameter,
        "get_usage_pieces",
        lambda ctx: [re.sub("[{}]", "", piece) for piece in pieces(ctx)],
    )


def _value(shown: re.Match[str]) -> str:
    """What is written for a type; choices as they are."""
    name = shown[1]
    return f" {_VALUES[name]}" if name in _VALUES else f" {name}" if "|" in name else shown[0]


def _range_in_words(shown: re.Match[str]) -> str:
    lowest, sign, last = (part and part.removesuffix(".0") for part in shown.groups())
    if lowest:
        return f"from {lowest} to {last}"
    return f"at least {last}" if sign == ">" else f"at most {last}"


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
