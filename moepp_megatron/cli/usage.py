"""Common to all commands: examples at the end of the help, and the refusal of wrong usage."""

import inspect
import re
import shlex
import sys
import textwrap
from typing import cast

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config.megatron_flags import setting_of
from moepp_megatron.config.schema.slurm import SlurmSection
from moepp_megatron.config.sections import section_models

# Commands of other programs, and what they are here.
_COMMANDS = {
    "eval": "moepp score, or moepp train with evaluation.tasks",
    "export": "moepp convert mcore-to-hf",
    "resume": "moepp train CONFIG --resume",
}

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
        error: A `UsageError`; its message is the help where a group was called without a command.

    Returns:
        The exit code.
    """
    context = getattr(error, "ctx", None)
    message: str = error.format_message()  # type: ignore[attr-defined]  # of no public class
    if context is not None and message == context.get_help():
        typer.echo(message, err=True)
        return 2
    path = "moepp" if context is None else context.command_path
    name = re.search("No such command '(.*?)'", message)
    if name is not None and name[1] in _COMMANDS:
        message = f"{name[0]}; write {_COMMANDS[name[1]]}"
    hint = _as_setting(str(getattr(error, "option_name", "")), path.endswith(" slurm"))
    echo(f"error: {' '.join(message.split()).rstrip('.')}{hint}; see {path} --help", err=True)
    return 2


def _as_setting(option: str, is_of_slurm: bool) -> str:
    """Suggest a setting, ours or Megatron-LM's, for an unknown option."""
    name = option.lstrip("-").replace("-", "_")
    if is_of_slurm and name in SlurmSection.model_fields:
        name = f"slurm.{name}"
    elif (of_megatron := setting_of(option)) is not None:
        return f"; Megatron's option is the setting {of_megatron}=VALUE here"
    if name.partition(".")[0] not in section_models():
        return ""
    words = [*sys.argv, "VALUE"]
    place = next((i for i, word in enumerate(words) if word.partition("=")[0] == option), -2)
    value = words[place].partition("=")[2] or words[place + 1]
    return f"; write {shlex.join([f'{name}={value}'])}"
