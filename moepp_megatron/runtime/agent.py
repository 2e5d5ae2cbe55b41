"""torchrun that reports a failure in one line per rank. Run by `python -m` with its arguments.

Ranks print their own errors. torchrun adds a traceback of its own code and a table, between which
the error is hard to find. It also starts all ranks anew after any failure, and a user's error would
only be repeated. On several machines it ends when another one has (`runtime.peer_failure`).
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.exit_codes import HUNG
from moepp_megatron.runtime.launch import MACHINES, refusal
from moepp_megatron.runtime.nodes import Nodes
from moepp_megatron.runtime.patches import replace
from moepp_megatron.runtime.peer_failure import NO_STACKS, Watch
from moepp_megatron.runtime.terminal import lasting_output

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def main() -> int:
    """Run torchrun with this process's arguments; 0 when all ranks ended with 0, else 1."""
    level = os.environ.get(NO_STACKS[0])
    os.environ.setdefault(*NO_STACKS)
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    if level is None:
        # Ranks are to warn.
        del os.environ[NO_STACKS[0]]
    # It names each failed rank in a line of its own, which is said below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    _restart_only_what_can_succeed()
    watch = None
    if (machines := os.environ.pop(MACHINES, None)) is not None:
        nodes, alike = json.loads(machines)
        watch = Watch(Nodes(**nodes), alike)
        watch.start()
        # torchrun would let machines of other numbers meet. The first one serves the store.
        if watch.nodes.rank:
            watch.compared.wait()
    try:
        torchrun()
    except (ConfigError, ChildFailedError, RendezvousError, DistError) as error:
        # While the error is held: its frames hold the store, which this process may serve.
        _report(error, watch)
        return 1
    return 0


def _report(error: Exception, watch: Watch | None) -> None:
    """Report failures here and to the other machines."""
    lines = _lines(error)
    if watch is not None:
        # The others see by themselves that a run hangs, or that they do not meet.
        is_new = hasattr(error, "failures") or refusal() is not None
        hangs = any(line.endswith(f" {HUNG}") for line in lines)
        watch.report(lines[0] if is_new and not hangs else None)
    # A rank that has refused has said why; what other ranks met is that it was gone.
    for line in lines if refusal() is None else []:
        print(f"error: {line}", file=sys.stderr)


def _lines(error: Exception) -> list[str]:
    """One line for each failure."""
    if (failures := getattr(error, "failures", None)) is None:
        # torchrun's own error refers to its cause.
        why = f": {text}" if (text := str(error.__cause__ or error).partition("\n")[0]) else ""
        return [f"the machines do not meet ({type(error).__name__}{why})"]
    in_order = sorted(failures.items(), key=lambda each: each[1].timestamp)
    return [f"rank {rank} {_how(failure)}" for rank, failure in in_order]


def _restart_only_what_can_succeed() -> None:
    """Patch torchrun, which has no setting to exempt a kind of failure from restarts."""
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

    restart = SimpleElasticAgent._restart_workers

    def restart_unless_refused(agent: SimpleElasticAgent, group: WorkerGroup) -> None:
        if refusal() is not None:
            raise ConfigError("a rank has refused")
        restart(agent, group)

    replace(SimpleElasticAgent, "_restart_workers", restart_unless_refused)


def _how(failure: ProcessFailure) -> str:
    """Describe how a rank ended."""
    if failure.exitcode >= 0:
        return f"ended with exit status {failure.exitcode}"
    return f"was ended by {signal.Signals(-failure.exitcode).name}"


if __name__ == "__main__":
    with lasting_output():
        end = main()
    # Python's own end aborts where the watch comes back from the store meanwhile.
    os._exit(end)
