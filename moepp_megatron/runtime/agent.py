"""torchrun that reports a failure in one line per rank, and to the other machines of the run.

Ranks print their own errors. torchrun adds a traceback of its own code and a table, between which
the error is hard to find. It also starts all ranks anew after any failure, and a user's error would
only be repeated. And it waits minutes for a machine that is missing, also for one that ended with a
user's error in its first second. So such a machine publishes its failure in torchrun's store.
Others poll it while they wait and train, and end with the same exit status.

Run by `python -m` with torchrun's arguments.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.exit_codes import HUNG
from moepp_megatron.runtime.launch import MACHINES, refusal
from moepp_megatron.runtime.nodes import Nodes
from moepp_megatron.runtime.patches import replace
from moepp_megatron.runtime.printable import printable
from moepp_megatron.runtime.terminal import lasting_output

if TYPE_CHECKING:
    from torch.distributed import Store
    from torch.distributed.elastic.agent.server.api import WorkerGroup
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Longest wait until the others have read a message: they may still import torch.
LINGER_S = 20.0
# Longest wait, after ranks failed, for another machine's message, which may be the cause.
_OTHERS_S = 5.0
_POLL_S = 0.5
# While ranks train: the store serves hundreds of machines for weeks.
_TRAINING_POLL_S = 2.0
# Read when torch is imported: in C++ it prints a stack whenever somebody closes a connection.
NO_STACKS = ("TORCH_CPP_LOG_LEVEL", "ERROR")
# An exit status, and why.
Word = tuple[int, str]


class _Watch(threading.Thread):
    """Thread that publishes a failure to other machines, and ends this process by theirs."""

    def __init__(self, nodes: Nodes, alike: dict[str, str]) -> None:
        """`alike`: values that must match on all machines, by name."""
        super().__init__(daemon=True)
        self.nodes, self._alike = nodes, alike
        self._failure: Word | None = None
        # Set when all machines have looked whether they are alike.
        self.compared = threading.Event()

    def run(self) -> None:
        """Run until another machine has ended, or this one has published."""
        has_ended = False
        while not has_ended:
            # A connection may be lost for a while, and torchrun notices a lost store by itself.
            with suppress(RuntimeError):
                has_ended = self._look()
            time.sleep(_POLL_S)

    def report(self, failure: str | None) -> None:
        """Let the other machines know of a failure, if any; theirs may end this process."""
        self.join(_OTHERS_S if refusal() is None else 0.0)
        if failure is not None and _is_served(self.nodes):
            self._failure = (1, failure)
            self.join(LINGER_S)

    def _look(self) -> bool:
        """Poll for a message until there is one; False if the store does not answer."""
        if (store := open_store(self.nodes, math.inf)) is None:
            return False
        if (word := self._difference(store)) is not None:
            # The machine that serves the store may leave as soon as it has read this.
            publish_failure(store, self.nodes, word, has_met=False)
        else:
            store.add("compared", 1)
        has_met = False
        while word is None and _is_served(self.nodes):
            if not self.compared.is_set() and store.add("compared", 0) >= self.nodes.count:
                self.compared.set()
            word = _read(store, self.nodes)
            if word is None and (failure := refusal() or self._failure) is not None:
                publish_failure(store, self.nodes, failure)
                return True
            if not has_met and psutil.Process().children():
                store.set("met", "")
                has_met = True
            time.sleep(_TRAINING_POLL_S if has_met else _POLL_S)
        if word is not None:
            print(f"error: {printable(word[1])}", file=sys.stderr, flush=True)
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            os._exit(word[0])
        return False

    def _difference(self, store: Store) -> Word | None:
        """The first difference from the machine that came first."""
        here, mine = socket.gethostname(), self._alike
        there, others = json.loads(store.compare_set("alike", "", json.dumps([here, mine])))
        differing = [name for name in [*mine, *others] if mine.get(name) != others.get(name)]
        if not differing:
            return None
        own, other = (alike.get(differing[0], "nothing") for alike in (mine, others))
        return ConfigError.exit_code, (
            f"{differing[0]} ({own} on {here}) must be the same on all machines, and is {other} on "
            f"{there}; start all with the same options, configuration and packages"
        )


def open_store(nodes: Nodes, timeout_s: float, serves: bool = False) -> Store | None:
    """The store at the machines' address; None if it is not served in time, or cannot be here."""
    from torch.distributed import PrefixStore, TCPStore

    deadline = time.monotonic() + timeout_s
    while not (serves or _is_served(nodes)):
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)
    limit, place = timedelta(seconds=LINGER_S), (nodes.host, nodes.port)
    with suppress(RuntimeError):
        store = TCPStore(*place, is_master=serves, wait_for_workers=False, timeout=limit)
        return PrefixStore(f"moepp {nodes.run_id}", store)
    return None


def _is_served(nodes: Nodes) -> bool:
    """True if a server listens; checked first, since torch prints C++ errors."""
    with suppress(OSError), socket.create_connection((nodes.host, nodes.port), timeout=5.0):
        return True
    return False


def publish_failure(store: Store, nodes: Nodes, word: Word, has_met: bool = True) -> None:
    """Publish a failure, unless another machine has; wait up to `LINGER_S` for readers.

    Without `has_met` it ends no machines that train already: they are another run, or wait for
    this one to rejoin.
    """
    if has_met or not store.check(["met"]):
        reason = f"{socket.gethostname()}: {word[1].partition('\n')[0]}"
        store.compare_set("word", "", json.dumps([word[0], reason]))
        _read(store, nodes)


def _read(store: Store, nodes: Nodes) -> Word | None:
    """Read another machine's message; return once all have read it or after `LINGER_S`."""
    # This machine may serve the store to the others.
    if not store.check(["word"]):
        return None
    status, said = json.loads(store.get("word"))
    readers, deadline = store.add("readers", 1), time.monotonic() + LINGER_S
    while readers < nodes.count and time.monotonic() < deadline and _is_served(nodes):
        time.sleep(0.1)
        with suppress(RuntimeError):
            readers = store.add("readers", 0)
    return status, f"another machine has ended this run, {said}; exit status {status}"


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
        watch = _Watch(Nodes(**nodes), alike)
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


def _report(error: Exception, watch: _Watch | None) -> None:
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
