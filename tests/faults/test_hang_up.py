"""A terminal that closes, as when ssh breaks off: the run saves, or with nohup trains on."""

import json
import os
import signal

import pytest

from tests.commands import MODULE, Begun
from tests.faults.harness import losses, short_steps, wait_for_step, write_config

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

LONG = 20000
SHORT = 60
MAIN = f"runpy.run_module({MODULE!r}, run_name='__main__', alter_sys=True)\n"
# As nohup, and as a script's background job: what is ignored here is ignored in what this starts.
NOHUP = (
    """
import runpy, signal
for number in (signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
"""
    + MAIN
)
# The first terminal that a session's leader opens for reading is that of the session.
IN_TERMINAL = (
    """
import os, runpy, sys
terminal = os.open(sys.argv.pop(1), os.O_RDWR)
for number in range(3):
    os.dup2(terminal, number)
"""
    + MAIN
)
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", MODULE]


class Hung:
    """A run in a session of its own, as a terminal's foreground is."""

    def __init__(self, folder, data, num_ranks, steps):
        self.run = folder / "run"
        self.log = folder / "log"
        sizes = short_steps(num_ranks)
        self.config = write_config(
            folder / "run.yaml", data, self.run, num_ranks, train_iters=steps, **sizes
        )
        self.words = ["train", str(self.config)]
        if num_ranks > 1:
            self.words += ["--nproc", str(num_ranks)]

    def start(self, *words):
        environment = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}
        options = {"environment": environment, "new_session": True}
        self.process = Begun(words, self.log, **options)  # type: ignore[arg-type]
        return self.process

    def wait_for_step(self, step):
        wait_for_step(self.process, self.run, step, self.log)

    def text(self):
        return self.log.read_text(errors="replace")[-5000:] if self.log.exists() else ""

    def lost(self):
        """Steps that are in the records and in no checkpoint."""
        latest = (self.run / "checkpoints/latest").read_text().strip()
        return max(losses(self.run)) - int(latest.removeprefix("step_"))

    def end(self):
        """Kill what is left: the session's leader takes the others with it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture
def begin(tmp_path, data):
    begun = []

    def make(num_ranks, steps=LONG):
        begun.append(Hung(tmp_path, data, num_ranks, steps))
        return begun[-1]

    yield make
    for each in begun:
        each.end()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_closed_terminal_costs_nothing(begin, tmp_path, num_ranks):
    hung = begin(num_ranks)
    program = tmp_path / "terminal_of_test.py"
    program.write_text(IN_TERMINAL)
    master, slave = os.openpty()
    process = hung.start(str(program), os.ttyname(slave), *hung.words)
    shown = b""
    # A bar, drawn by a thread of its own.
    while b"ETA" not in shown:
        shown += os.read(master, 1 << 16)
    hung.wait_for_step(3)
    os.close(slave)
    os.close(master)
    assert process.wait(120) == 75
    assert hung.lost() == 0
    status = json.loads((hung.run / "status.json").read_text())
    assert status["state"] == "ended"
    assert status["resume_command"].endswith(" --resume")


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_hang_up_of_all_processes_stops_as_ctrl_c_does(begin, num_ranks):
    hung = begin(num_ranks)
    process = hung.start("-m", MODULE, *hung.words)
    hung.wait_for_step(3)
    # Shell and kernel each send one.
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(120) == 75, hung.text()
    assert hung.lost() == 0
    lines = hung.log.read_text().splitlines()
    assert lines[-3:-1] == [
        f"stopped on request at step {max(losses(hung.run))}, saved",
        "to resume:",
    ]
    assert lines[-1].endswith(" --resume")
    assert "Traceback" not in hung.text()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_with_nohup_it_trains_on(begin, tmp_path, num_ranks):
    hung = begin(num_ranks, SHORT)
    program = tmp_path / "nohup_of_test.py"
    program.write_text(NOHUP)
    process = hung.start(str(program), *hung.words)
    hung.wait_for_step(3)
    for number in (signal.SIGHUP, signal.SIGINT):
        os.killpg(process.pid, number)
    assert process.wait(120) == 0, hung.text()
    assert sorted(losses(hung.run)) == list(range(1, SHORT + 1))


def test_under_a_foreign_torchrun_ranks_save(begin):
    hung = begin(2)
    process = hung.start("-m", *TORCHRUN, "train", str(hung.config))
    hung.wait_for_step(3)
    os.killpg(process.pid, signal.SIGHUP)
    # Its own status, whatever ranks end with.
    assert process.wait(120) == 1
    assert hung.lost() == 0
    assert "to resume:" in hung.log.read_text()
