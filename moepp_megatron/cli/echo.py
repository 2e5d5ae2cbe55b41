"""Prints the output of commands, which may quote untrusted files, safely for a terminal."""

from __future__ import annotations

import typer

from moepp_megatron.config.printable import printable


def echo(text: str, err: bool = False) -> None:
    """Write lines to stdout, or stderr, with control characters as escapes."""
    typer.echo(printable(text), err=err)
