"""What commands say, made safe for a terminal: it may quote a file that comes from elsewhere."""

from __future__ import annotations

import typer

from moepp_megatron.config.printable import printable


def echo(text: str, err: bool = False) -> None:
    """Write lines to stdout, or stderr, with what a terminal would obey as escapes."""
    typer.echo(printable(text), err=err)
