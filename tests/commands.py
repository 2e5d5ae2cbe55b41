"""`moepp` commands in processes of their own, most of them without the imports.

torch and megatron-core take four seconds of computing to import, more than most commands do. So
`moepp` forks from the server that test ranks are forked from (tests/parallel/ranks.py), which has
imported them, and so do torchrun and the ranks that it starts (tests/warm.py). `cold` is what a
user's shell starts, for tests of a start itself: what is imported when, what is printed at an
import.
"""

import multiprocessing.process
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests import warm
from tests.parallel.ranks import fork_server

MODULE = "moepp_megatron.cli.main"
TIMEOUT_S = 240.0


def slowdown():
    """Return how much longer work takes than on idle cores: the load per core, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def moepp(*arguments, cwd=None):
    """Runs a command in a fork of the server of ranks; ranks that it starts are real ones."""
    return forked(["-m", MODULE, *map(str, arguments)], cwd)


def module(name, *arguments, cwd):
    """As `moepp`, any module: `python -m name arguments`."""
    return forked(["-m", name, *map(str, arguments)], cwd)


def program(path, *arguments):
    """As `moepp`, a Python program, in its own folder."""
    return forked([str(path), *map(str, arguments)], path.parent)


def cold(*arguments):
    """Runs a command as a shell does."""
    command = [sys.executable, "-m", MODULE, *map(str, arguments)]
    return captured(command, timeout=TIMEOUT_S)


def captured(command, *, check=False, **options):
    """`subprocess.run`, with its output as text."""
    return subprocess.run(command, capture_output=True, text=True, check=check, **options)


def succeeded(done):
    """The command as it ended, whose output is shown where it failed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done


class Begun:
    """A process forked from the server, with what `subprocess.Popen` offers to look after it."""

    def __init__(
        self,
        words,
        output,
        errors=None,
        *,
        cwd=None,
        environment=None,
        new_session=False,
    ):
        environment = dict(os.environ) if environment is None else environment
        outputs = (str(output), str(errors or output))
        folder = str(cwd or Path.cwd())
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        arguments = (list(words), environment, folder, outputs, new_session, mask)
        with fork_server() as context:
            self._process = context.Process(target=_run, args=arguments)
            self._process.start()
        # Not to be ended with pytest's process by multiprocessing, which would wait for it.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.args = list(words)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Heard(Begun):
    """One whose output, stdout and stderr together, is read while it comes."""

    def __init__(self, words, folder, **options):
        fifo = Path(tempfile.mkdtemp(dir=folder), "output")
        os.mkfifo(fifo)
        super().__init__(words, fifo, **options)
        # Returns when the process has opened its end.
        self.stdout = fifo.open()

    def communicate(self, timeout=None):
        """The rest of the output, once all that could print has ended."""
        output = self.stdout.read()
        self.wait(timeout)
        return output, None


def forked(words, folder, environment=None):
    """As `moepp`, a program, or "-m" and a module, with an environment of its own."""
    with tempfile.TemporaryDirectory() as written:
        outputs = [Path(written) / name for name in ("stdout", "stderr")]
        process = Begun(words, *outputs, cwd=folder, environment=environment)
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            printed = [path.read_bytes() for path in outputs]
            raise subprocess.TimeoutExpired(words, TIMEOUT_S, *printed) from None
        texts = [path.read_text(errors="replace") for path in outputs]
        return subprocess.CompletedProcess(words, status, *texts)


def _run(words, environment, folder, outputs, new_session, mask):
    """The process: everything that the caller could tell from a start of its own is as there."""
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if new_session:
        os.setsid()
        # As in a new terminal, also where the tests run under nohup or in a script's background.
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    warm.install()
    warm.run(words, environment, folder)
