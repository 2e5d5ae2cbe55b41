"""Process groups that tests send functions to.

Importing torch and megatron-core takes seconds, far more than most multi-rank tests. So ranks are
started once per world size, forked from one server that has done those imports, and each test sends
them a module-level function:

    def sum_over_ranks(start):              # runs on every rank; the gloo default group is up
        value = torch.tensor(start + dist.get_rank())
        dist.all_reduce(value)
        return value.item()

    @pytest.mark.parallel
    def test_sum(ranks):
        assert ranks(2).run(sum_over_ranks, 10) == [21, 21]

A call on which any rank fails ends its ranks, for their collectives may be out of step; the next
call starts fresh ones. What the ranks do is in `rank_worker.py`.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal
import tempfile
import time
from collections import OrderedDict
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any
from unittest import mock

from tests.parallel.rank_worker import PRELOADED_MODULES, serve

START_TIMEOUT_S = 120.0
# Only against hangs: what computes for seconds takes minutes on a busy machine.
CALL_TIMEOUT_S = 240.0
# After one rank has failed, the others usually wait for it in a collective until they are ended.
GRACE_S = 2.0
# A signalled rank writes its stacks at once, but a busy machine may not let it run for a while.
STACK_TIMEOUT_S = 30.0
# faulthandler writes the main thread's stack last, and its module last of that.
_STACKS = re.compile(rb"\(most recent call first\):\n(  File .*\n)*  File .* in <module>\n")
# Ranks alive at once, over all world sizes: pools of 1, 2, 4 and 8 together. What ranks share
# with the server is most of their memory; about 100 MB each is their own.
MAX_RANKS_ALIVE = 16
LOG_TAIL_LINES = 60

# What the fork server and so every rank inherits, for the time of its start.
_SERVER_ENVIRONMENT = {
    # A rank is one thread; the server must have no threads at all for a safe fork.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # A lone process of `moepp` takes all cores: its threads must not spin for each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # These are CPU ranks, on machines with GPUs too.
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
    # As runtime/cpu_support.py sets it, but before the server imports megatron-core.
    "TORCHDYNAMO_DISABLE": "1",
    # For moe.fused=true: Triton, which megatron-core imports, runs kernels on CPU tensors.
    "TRITON_INTERPRET": "1",
}


class RankError(AssertionError):
    """A function failed on some rank."""

    def __init__(self, message, reasons):
        super().__init__(message)
        self.reasons = reasons


class RankPool:
    """`world_size` processes with a gloo default group, waiting for functions."""

    def __init__(self, world_size):
        if world_size < 1:
            raise ValueError(f"world_size ({world_size}) must be at least 1")
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._folder: Path | None = None

    @property
    def is_alive(self):
        return bool(self._processes) and all(p.is_alive() for p in self._processes)

    def run(self, function, *args, timeout=CALL_TIMEOUT_S, **kwargs):
        """Calls `function(*args, **kwargs)` on every rank."""
        name = getattr(function, "__qualname__", "")
        if not name or "<" in name:
            raise TypeError(
                f"{function!r} must be a module-level function: ranks import it by name"
            )
        call = pickle.dumps((function.__module__, name, args, kwargs))
        try:
            if not self.is_alive:
                self.stop()
                self._start()
            for log in self._logs():
                os.truncate(log, 0)
            for rank in range(self.world_size):
                self._send(rank, call)
            return self._collect(f"{function.__module__}.{name}", timeout)
        except BaseException:
            # Also on Ctrl-C and pytest's own timeout: what the ranks are doing is unknown.
            self.stop()
            raise

    def stop(self):
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self):
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        with fork_server() as context:
            for rank in range(self.world_size):
                ours, theirs = context.Pipe()
                log = self._folder / f"{rank}.log"
                log.touch()
                process = context.Process(
                    target=serve, args=(rank, self.world_size, theirs, log), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        # Rank 0 opens the rendezvous on a free port and says which.
        port = self._receive_port()
        for rank in range(1, self.world_size):
            self._send(rank, pickle.dumps(port))
        self._collect("starting the ranks", START_TIMEOUT_S)

    def _receive_port(self):
        try:
            if self._pipes[0].poll(START_TIMEOUT_S):
                port: int = pickle.loads(self._pipes[0].recv_bytes())
                return port
        except EOFError:
            pass
        raise self._error("starting the ranks", {0: "no rendezvous was opened"}, [])

    def _send(self, rank, message):
        # A rank that has just died is reported by _collect, with its exit status and output.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._pipes[rank].send_bytes(message)

    def _collect(self, what, timeout):
        """Waits for one answer from every rank."""
        results: dict[int, Any] = {}
        reasons: dict[int, str] = {}
        waiting = {self._pipes[rank]: rank for rank in range(self.world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, connection.Connection), "only pipes are waited for"
                rank = waiting.pop(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    succeeded, value = False, self._how_it_ended(rank)
                if succeeded:
                    results[rank] = value
                else:
                    reasons[rank] = value
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        stuck = sorted(waiting.values())
        if stuck and not reasons:
            reasons = dict.fromkeys(stuck, f"still at work after {timeout:g} s")
        if reasons:
            raise self._error(what, reasons, stuck)
        return [results[rank] for rank in range(self.world_size)]

    def _how_it_ended(self, rank):
        process = self._processes[rank]
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exited with status {code} in the middle of the call"

    def _error(self, what, reasons, stuck):
        """Puts together the message; ranks in `stuck` are asked for their stacks first."""
        self._dump_stacks(stuck)
        lines = [f"{what} failed on {len(reasons)} of {self.world_size} ranks"]
        shown: dict[str, int] = {}
        for rank, reason in reasons.items():
            if reason in shown:
                lines.append(f"---- rank {rank}: as rank {shown[reason]}")
                continue
            shown[reason] = rank
            lines.append(f"---- rank {rank}: {reason.rstrip()}")
        for rank, log in enumerate(self._logs()):
            output = log.read_text(errors="replace").splitlines()
            if output:
                title = "output, and stack when ended" if rank in stuck else "output"
                lines.append(f"---- rank {rank}, {title}:")
                lines += output[-LOG_TAIL_LINES:]
        return RankError("\n".join(lines), reasons)

    def _dump_stacks(self, ranks):
        """Has each rank write its stacks to its log, and waits until they are there."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)  # see rank_worker
        deadline = time.monotonic() + STACK_TIMEOUT_S
        for rank in ranks:
            log = self._logs()[rank]
            while not _STACKS.search(log.read_bytes()):
                if time.monotonic() > deadline or not self._processes[rank].is_alive():
                    break
                time.sleep(0.05)

    def _logs(self):
        assert self._folder is not None, "the pool has not been started"
        return [self._folder / f"{rank}.log" for rank in range(self.world_size)]


class RankPools:
    """Pools by world size: started on first use, the least recently used ended to make room."""

    def __init__(self, max_ranks_alive=MAX_RANKS_ALIVE):
        self._max_ranks_alive = max_ranks_alive
        self._pools: OrderedDict[int, RankPool] = OrderedDict()

    def __call__(self, world_size):
        pool = self._pools.pop(world_size, None) or RankPool(world_size)
        while self._pools and world_size + sum(self._pools) > self._max_ranks_alive:
            self._pools.popitem(last=False)[1].stop()
        self._pools[world_size] = pool
        return pool

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        for pool in self._pools.values():
            pool.stop()


@contextlib.contextmanager
def fork_server():
    """For starting processes: forks of a server that has made the imports, started on first use."""
    context = get_context("forkserver")
    with mock.patch.dict(os.environ, _SERVER_ENVIRONMENT):
        context.set_forkserver_preload(PRELOADED_MODULES)
        yield context
