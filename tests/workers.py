"""Runs the collected tests on several forks of pytest's process.

What costs seconds in every new interpreter is done once, for all workers: the imports of torch and
megatron-core, the collection, and the server that test ranks are forked from. Units of tests
(tests/timetable.py) lie in a pipe in their order, and a worker that has nothing left takes the next
one. Reports and warnings come back through a pipe of each worker, and pytest's own process prints
and counts them. If a worker dies, its test has failed, and a new worker does what it had taken.
"""

import contextlib
import itertools
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, get_context
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.rank_worker import worker_setup
from tests.parallel.ranks import fork_server
from tests.timetable import unit_of

# How long fixtures may take to end what they have started, before their worker is killed.
_END_S = 60.0
_TICKET_BYTES = 4


@dataclass
class _Worker:
    """What pytest's process knows of a fork."""

    process: Any
    pipe: connection.Connection
    at: int | None = None
    left: deque[int] = field(default_factory=deque)

    def receive(self) -> tuple[str, Any]:
        """Kind and content of the next message."""
        try:
            message: tuple[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            # The end of the process, perhaps in the middle of a message.
            return ("ended", None)
        return message


class Workers:
    """Plugin of a session whose tests several workers share."""

    def __init__(self, config: pytest.Config, count: int) -> None:
        self._config, self._count = config, count
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()
        self._ended = 0
        # In a worker: where its messages go.
        self._pipe: connection.Connection | None = None

    def pytest_sessionstart(self) -> None:
        """Prepare what all workers have."""
        # Each worker has a folder below it.
        self._folder = self._config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
        # What imports warn of is of no interest to a reader of the tests' results.
        with _output_to(self._folder / "imports.log"):
            self.import_once()

    def import_once(self) -> None:
        """Start the server of ranks, which imports while tests are collected; import here, too."""
        with fork_server():
            forkserver.ensure_running()
        # As tests/unit/moe/conftest.py does.
        worker_setup()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Have the workers run everything; pytest itself says what was wrong in a collection."""
        if session.testsfailed or session.config.option.collectonly or not session.items:
            return None
        self._units = _units(session.items)
        self._tickets = _filled_pipe(len(self._units))
        try:
            for _ in range(min(self._count, len(self._units))):
                self._start(session, [])
            while self._workers:
                self._listen(session)
        finally:
            self._end()
        if self._ended != len(session.items):
            raise RuntimeError(f"{self._ended} of {len(session.items)} tests have ended")
        return True

    # ---- pytest's process ----------------------------------------------------------------

    def _start(self, session: pytest.Session, first: list[int]) -> None:
        reader, writer = connection.Pipe(duplex=False)
        sys.stdout.flush()
        sys.stderr.flush()
        process = get_context("fork").Process(
            target=self._work, args=(session, first, writer, next(self._numbers))
        )
        process.start()
        writer.close()
        self._workers.append(_Worker(process, reader, left=deque(first)))

    def _listen(self, session: pytest.Session) -> None:
        pipes, hook = {worker.pipe: worker for worker in self._workers}, self._config.hook
        for pipe in connection.wait(list(pipes)):
            worker = pipes[pipe]  # type: ignore[index]
            kind, content = worker.receive()
            if kind == "ended":
                self._has_ended(session, worker)
            elif kind == "takes":
                worker.left.extend(self._units[content])
            elif kind == "begins":
                worker.at = worker.left.popleft()
            elif kind == "finishes":
                item = session.items[worker.at]
                worker.at = None
                self._ended += 1
                hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            elif kind == "warns":
                hook.pytest_warning_recorded.call_historic(kwargs=_received(content))
            else:
                report = hook.pytest_report_from_serializable(config=self._config, data=content)
                hook.pytest_runtest_logreport(report=report)
        if session.shouldfail:
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)

    def _has_ended(self, session: pytest.Session, worker: _Worker) -> None:
        """Go on with what a worker leaves, if it died."""
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        status = worker.process.exitcode
        if worker.at is not None:
            self._ended += 1
            item = session.items[worker.at]
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            self._config.hook.pytest_runtest_logreport(report=_death_report(item, how))
        elif status != 0:
            raise RuntimeError(f"a worker ended with status {status} between two tests")
        if worker.left:
            self._start(session, list(worker.left))

    def _end(self) -> None:
        """Have workers that are at work end it, with their fixtures."""
        for worker in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGINT)
        for worker in self._workers:
            worker.process.join(_END_S)
            worker.process.kill()
            worker.pipe.close()
        self._workers = []

    # ---- a worker ------------------------------------------------------------------------

    def _work(
        self, session: pytest.Session, first: list[int], pipe: connection.Connection, number: int
    ) -> None:
        self._pipe = pipe
        self._become_a_worker(number)
        left = deque(first)
        try:
            while left or self._take(left):
                index = left.popleft()
                self._send("begins", None)
                if not left:
                    # Fixtures of the session stay for what comes next.
                    self._take(left)
                following = session.items[left[0]] if left else None
                item = session.items[index]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                self._send("finishes", None)
        except (KeyboardInterrupt, BrokenPipeError):
            # pytest's process asks for it, or is gone.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        finally:
            session._setupstate.teardown_exact(None)

    def _become_a_worker(self, number: int) -> None:
        for worker in self._workers:
            worker.pipe.close()
        manager = self._config.pluginmanager
        reporter: Any = manager.get_plugin("terminalreporter")
        reporter._tw = type(reporter._tw)(open(os.devnull, "w"))  # noqa: SIM115
        # What is captured goes through files, whose positions forks share.
        capture: Any = manager.get_plugin("capturemanager")
        capture.stop_global_capturing()
        capture.start_global_capturing()
        folder = Path(self._folder, f"worker-{number}")
        folder.mkdir(mode=0o700)
        self._config._tmp_path_factory._basetemp = folder  # type: ignore[attr-defined]
        # The server is pytest's child, not to be waited for from here.
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]

    def _take(self, left: deque[int]) -> bool:
        """Take the next unit, if there is one."""
        ticket = os.read(self._tickets, _TICKET_BYTES)
        if ticket:
            unit = int.from_bytes(ticket)
            self._send("takes", unit)
            left.extend(self._units[unit])
        return bool(ticket)

    def _send(self, kind: str, content: object) -> None:
        assert self._pipe is not None, "only workers have something to say"
        self._pipe.send((kind, content))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In a worker: pass it on."""
        if self._pipe is not None:
            hook = self._config.hook
            data = hook.pytest_report_to_serializable(config=self._config, report=report)
            self._send("reports", data)

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: object
    ) -> None:
        """In a worker: pass it on."""
        if self._pipe is not None:
            said = (warning_message.category.__name__, str(warning_message.message))
            place = (warning_message.filename, warning_message.lineno)
            self._send("warns", (*said, *place, when, nodeid, location))


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what this process and those that it starts print to `path`."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, before in enumerate(kept, 1):
            os.dup2(before, number)
            os.close(before)


def _units(items: list[pytest.Item]) -> list[list[int]]:
    """Numbers of the items of each unit, which follow each other."""
    numbered = itertools.groupby(range(len(items)), lambda index: unit_of(items[index].nodeid))
    return [list(numbers) for _, numbers in numbered]


def _filled_pipe(count: int) -> int:
    """A pipe with the numbers below `count`, each of which is read by one process."""
    reader, writer = os.pipe()
    os.write(writer, b"".join(number.to_bytes(_TICKET_BYTES) for number in range(count)))
    os.close(writer)
    return reader


def _received(content: Any) -> dict[str, Any]:
    """Arguments of `pytest_warning_recorded`, whose category need not be imported here."""
    name, text, *place, when, nodeid, location = content
    category = type(name, (UserWarning,), {})
    message = warnings.WarningMessage(category(text), category, *place)
    return {"warning_message": message, "when": when, "nodeid": nodeid, "location": location}


def _death_report(item: pytest.Item, how: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"{item.name}: the worker ended in this test: {how}",
        when="call",
    )
