"""The machines that a command's options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moepp_megatron.config import ConfigError

if TYPE_CHECKING:
    from moepp_megatron.runtime.nodes import Nodes


def machines(count: int, rank: int | None, endpoint: str | None, run_id: str) -> Nodes | None:
    """The machines of a run on several; None on one.

    Raises:
        ConfigError: The options do not belong together.
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
        nodes.local_address()
    except ValueError as error:
        raise ConfigError(f"--rdzv-endpoint {error}; give for example node01:29500") from None
    except OSError as error:
        raise ConfigError(
            f"--rdzv-endpoint ({endpoint}) must be reachable from here ({error.strerror}); check "
            "the name and the network"
        ) from None
    return nodes
