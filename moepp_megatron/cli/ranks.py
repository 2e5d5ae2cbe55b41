"""A command on several ranks of this machine, and the machines that its options name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

from moepp_megatron.cli.echo import echo_error
from moepp_megatron.config import ConfigError, UnfitError

if TYPE_CHECKING:
    from moepp_megatron.runtime.nodes import Nodes


def start_ranks(nproc: int, arguments: Sequence[str]) -> None:
    """Run `moepp ARGUMENTS` on each of `nproc` ranks; where one fails, leave as it has."""
    from moepp_megatron.runtime.launch import LaunchOptions, run_ranks

    status = run_ranks(LaunchOptions(nproc), "moepp_megatron.cli.main", arguments)
    if status != 0:
        raise typer.Exit(status)


def option_words(**values: object) -> list[str]:
    """The options of a command as words; those that are None or False, or not given, are left out.

    Args:
        values: By the option's name: a value, True for a flag, or a list for one that may repeat.
    """
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words.append(option if one is True else f"{option}={one}")
    return words


@contextmanager
def refusing_for_all(nodes: Nodes | None) -> Iterator[None]:
    """A context in which a user's error ends the other machines too, before ranks have started.

    Raises:
        typer.Exit: In place of the error, which is printed; not without `nodes`.
    """
    try:
        yield
    except (ConfigError, UnfitError) as error:
        if nodes is None:
            raise
        # First, since the others may be slow to read it.
        status = echo_error(error)
        from moepp_megatron.runtime import agent

        os.environ.setdefault(*agent.NO_STACKS)
        store = agent.open_store(nodes, agent.LINGER_S, serves=nodes.rank == 0)
        with suppress(RuntimeError):
            if store is not None:
                agent.publish_failure(store, nodes, (status, str(error)), has_met=False)
        raise typer.Exit(status) from None


def machines(
    count: int,
    rank: int | None,
    endpoint: str | None,
    run_id: str,
    restart_timeout_s: int | None = None,
) -> Nodes | None:
    """The machines of a run on several; None on one.

    Args:
        count: Machines.
        rank: Number of this machine from 0; None to let torchrun number them.
        endpoint: HOST or HOST:PORT where the machines meet.
        run_id: A name for this start of the run.
        restart_timeout_s: How long they wait for each other after a failure, in seconds; None for
            the default of `Nodes`.

    Raises:
        ConfigError: If the options contradict each other.
    """
    if rank is not None and rank >= count:
        raise ConfigError(
            f"--node-rank ({rank}) must be below --nnodes ({count}); number the machines from 0"
        )
    if count == 1:
        return None
    if endpoint is None:
        raise ConfigError(
            f"--nnodes ({count}) must come with --rdzv-endpoint; name machine 0's address, the "
            "same on all machines"
        )
    from moepp_megatron.runtime.nodes import Nodes, parse_endpoint

    try:
        host, port = parse_endpoint(endpoint)
        nodes = Nodes(count, rank, host, port, run_id)
        if restart_timeout_s is not None:
            nodes = dataclasses.replace(nodes, restart_timeout_s=restart_timeout_s)
        nodes.local_address()
    except ValueError as error:
        raise ConfigError(f"--rdzv-endpoint {error}; give for example node01:29500") from None
    except OSError as error:
        raise ConfigError(
            f"--rdzv-endpoint ({endpoint}) must be reachable from here ({error.strerror}); check "
            "the name and the network"
        ) from None
    return nodes
