"""`docs/commands.md`: every command with its arguments and options, from the command line itself.

Write it anew: `python -m benchmarks.commands_page`.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from moepp_megatron.cli.main import app

FILE = Path(__file__).parents[1] / "docs" / "commands.md"
_HEAD = """\
# Commands

Written by `python -m benchmarks.commands_page` from `moepp_megatron/cli`; do not edit.
Each command's `--help` prints the same in a terminal. A command's exit status is 0 when it is done,
2 for a wrong configuration or usage, 3 where this machine cannot do it, and 75 when it was asked to
stop and has written a checkpoint.
"""


def page() -> str:
    """The page."""
    command: Any = typer.main.get_command(app)
    _adapt(command)
    context = typer.Context(command, info_name="moepp", **command.context_settings)
    pages = get_docs_for_click(obj=command, ctx=context, name="moepp", indent=1)
    return f"{_HEAD}\n{pages.strip()}\n"


def _adapt(command: Any) -> None:
    """Put examples into blocks, and whole first sentences into lists, where click cuts them."""
    paragraph = " ".join(command.help.split("\n\n")[0].split())
    command.short_help = paragraph.partition(". ")[0].removesuffix(".") + "."
    examples = textwrap.dedent(command.epilog.split("\n", 2)[2])
    command.epilog = f"**Examples**:\n\n```bash\n{examples}\n```"
    for inner in getattr(command, "commands", {}).values():
        _adapt(inner)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
