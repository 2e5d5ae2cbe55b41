"""A command on several ranks of this machine."""

from __future__ import annotations

from collections.abc import Sequence

import typer


def start_ranks(nproc: int, arguments: Sequence[str]) -> None:
    """Run `moepp ARGUMENTS` on each of `nproc` ranks; where one fails, leave as it has."""
    from moepp_megatron.runtime.launch import LaunchOptions, run_ranks

    status = run_ranks(LaunchOptions(nproc), "moepp_megatron.cli.main", arguments)
    if status != 0:
        raise typer.Exit(status)
