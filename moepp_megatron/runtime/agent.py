"""torchrun that reports a failure in one line per rank. Run by `python -m` with its arguments.

Ranks print their own errors. torchrun adds a traceback of its own code and a table, between which
the error is hard to find. It also starts all ranks anew after any failure, and a user's error would
only be repeated.
"""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING

from moepp_megatron.runtime.launch import refusal_status
from moepp_megatron.runtime.patches import replace
from moepp_megatron.runtime.terminal import lasting_output

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import WorkerGroup
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


class _RefusedError(Exception):
    """A rank has ended with a user's error, so no rank is started anew."""


def main() -> int:
    """Run torchrun with this process's arguments; 0 when all ranks ended with 0, else 1."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    # It names each failed rank in a line of its own, which is said below.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    _restart_only_what_can_succeed()
    try:
        torchrun()
    except _RefusedError:
        return 1
    except ChildFailedError as error:
        if refusal_status() is not None:
            # The rank has said why; what other ranks met is that it was gone.
            return 1
        failures = sorted(error.failures.items(), key=lambda each: each[1].timestamp)
        for rank, failure in failures:
            print(f"error: rank {rank} {_end(failure)}", file=sys.stderr)
        return 1
    except RendezvousError as error:
        why = f": {error}" if str(error) else ""
        print(f"error: the machines do not meet ({type(error).__name__}{why})", file=sys.stderr)
        return 1
    return 0


def _restart_only_what_can_succeed() -> None:
    """Patch torchrun: it has no setting by which a failure of one kind is not tried again."""
    from torch.distributed.elastic.agent.server.api import SimpleElasticAgent

    restart = SimpleElasticAgent._restart_workers

    def restart_unless_refused(agent: SimpleElasticAgent, group: WorkerGroup) -> None:
        if refusal_status() is not None:
            raise _RefusedError
        restart(agent, group)

    replace(SimpleElasticAgent, "_restart_workers", restart_unless_refused)


def _end(failure: ProcessFailure) -> str:
    """The end of a rank, in words."""
    if failure.exitcode >= 0:
        return f"ended with exit status {failure.exitcode}"
    return f"was ended by {signal.Signals(-failure.exitcode).name}"


if __name__ == "__main__":
    with lasting_output():
        sys.exit(main())
