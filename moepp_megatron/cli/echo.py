"""Prints the output of commands, which may quote untrusted files, safely for a terminal."""

from __future__ import annotations

import typer

from moepp_megatron.config.printable import printable
from moepp_megatron.runtime.disk import naming_stream


def echo(text: str, err: bool = False) -> None:
    """Write lines to stdout, or stderr, with control characters as escapes."""
    with naming_stream(err):
        typer.echo(printable(text), err=err)
