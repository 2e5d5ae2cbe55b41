"""Processes that are forked where a shell would start an interpreter: the same but for imports."""

import signal
import sys

import pytest

from tests.commands import captured, program

STARTER = """
import os, signal, subprocess, sys, tempfile, threading

kept = tempfile.TemporaryDirectory()
handed_down = open(sys.argv[0])
os.set_inheritable(handed_down.fileno(), True)
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
threading.Thread(target=threading.Event().wait, daemon=True).start()
done = subprocess.run(
    [sys.executable, "-u", "-m", "started", "a b", kept.name, str(os.getpid())],
    env={**os.environ, "GIVEN": "yes"}, cwd=kept.name,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
)
print(done.returncode, done.stdout, done.stderr, os.path.isdir(kept.name))
"""
STARTED = """
import os, signal, sys, threading

what, folder, parent = sys.argv[1:]
print(__name__, what, os.environ["GIVEN"], os.getcwd() == os.path.realpath(folder))
print(os.getppid() == int(parent), os.getsid(0) == os.getpid(), threading.active_count())
print([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)])
print(signal.getsignal(signal.SIGINT), signal.pthread_sigmask(signal.SIG_BLOCK, []))
print(len(os.listdir("/proc/self/fd")))
print("torch" in sys.modules, file=sys.stderr)
sys.exit(7)
"""


@pytest.fixture
def starter(tmp_path, monkeypatch):
    (tmp_path / "started.py").write_text(STARTED)
    path = tmp_path / "starter.py"
    path.write_text(STARTER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return path


def test_a_fork_is_to_its_parent_what_a_start_is(starter):
    forked = program(starter)
    command = [sys.executable, str(starter)]
    cold = captured(command, cwd=starter.parent)
    assert cold.stdout.startswith("7 __main__ a b yes True\n"), cold.stderr
    assert forked.stdout.replace(" True\n True\n", " False\n True\n") == cold.stdout
    assert forked.stdout != cold.stdout, "torch was there already"
    assert (forked.returncode, forked.stderr) == (0, "")


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('so')", 1, "so\n"),
        ("pass", 0, ""),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'last')", 0, "last\n"),
    ],
)
def test_ends_are_those_of_an_interpreter(tmp_path, end, status, says):
    path = tmp_path / "program.py"
    path.write_text(f"import os, signal, sys\n{end}\n")
    done = program(path)
    assert done.returncode == status
    assert (done.stdout + done.stderr).endswith(says)
