"""Prints the output of commands, which may quote untrusted files, safely for a terminal."""

from __future__ import annotations

import typer

from moepp_megatron.config.printable import printable


def echo(text: str, err: bool = False) -> None:
    """Write lines to stdout, or stderr, with control characters as escapes."""
    typer.echo(printable(text), err=err)


def echo_of_run(text: str, err: bool = False) -> None:
    """Same as `echo`, for a training, whose end and exit status depend on no reader or disk."""
    try:
        echo(text, err)
    except OSError:
        from moepp_megatron.runtime.terminal import discard_output

        discard_output(2 if err else 1)
