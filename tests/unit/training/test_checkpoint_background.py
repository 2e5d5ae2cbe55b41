"""The forked process that writes checkpoints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp_megatron.training.checkpoint.background import Background, BackgroundError


def comes_true(condition):
    """Soon: in half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_done_turns_true_without_waiting():
    process = Background(lambda: time.sleep(0.2))
    assert not process.done()
    assert comes_true(process.done)
    assert process.result() is None


def test_error_is_passed_on():
    def fail():
        raise OSError(28, "No space left on device")

    with pytest.raises(BackgroundError, match=r"OSError: \[Errno 28\] No space left"):
        Background(fail).result()


def test_death_is_noticed():
    process = Background(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(BackgroundError, match="killed by signal 9"):
        process.result()


def test_kill_ends_it():
    process = Background(lambda: time.sleep(600))
    process.kill()
    assert process.done()


def test_signals_of_the_launcher_do_not_end_it(tmp_path):
    ready = tmp_path / "ready"

    def survive():
        ready.touch()
        time.sleep(0.3)
        return "written"

    process = Background(survive)
    assert comes_true(ready.exists)
    os.kill(process._pid, signal.SIGTERM)
    os.kill(process._pid, signal.SIGUSR1)
    assert process.result() == "written"


def test_orphan_dies_with_its_parent(tmp_path):
    code = f"""
import os, signal, time
from moepp_megatron.training.checkpoint.background import Background

def write():
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    time.sleep(600)

process = Background(write)
while not os.path.exists({str(tmp_path / "pid")!r}) or not open({str(tmp_path / "pid")!r}).read():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60)
    pid = int((tmp_path / "pid").read_text())

    def has_ended():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state == "Z"

    assert comes_true(has_ended)
