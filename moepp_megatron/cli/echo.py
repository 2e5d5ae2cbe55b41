"""Prints the output of commands, which may quote untrusted files, safely for a terminal."""

import typer

from moepp_megatron.config import ConfigError, UnfitError
from moepp_megatron.runtime.disk import is_full, naming_stream
from moepp_megatron.runtime.printable import printable


def echo(text: str, err: bool = False) -> None:
    """Write lines to stdout, or stderr, with control characters as escapes."""
    with naming_stream(err):
        typer.echo(printable(text), err=err)


def warn(*warnings: str) -> None:
    """Write warnings to stderr, a line each."""
    for warning in warnings:
        echo(f"warning: {warning}", err=True)


def echo_error(error: ConfigError | UnfitError) -> int:
    """Write a user's error to stderr; returns its exit status."""
    echo(f"error: {error}", err=True)
    # A full disk is never wrong usage, whoever has met it.
    return UnfitError.exit_code if is_full(error) else error.exit_code
