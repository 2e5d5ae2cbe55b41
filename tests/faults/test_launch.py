"""run_ranks with ranks of a few lines: statuses, signals, orphans."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from moepp_megatron.runtime.stop_signals import SAME_INTERRUPT_S
from tests import ROOT
from tests.commands import Heard
from tests.faults.harness import wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

LAUNCHER = """
import sys
from pathlib import Path
from moepp_megatron.runtime.launch import LaunchOptions, run_ranks
kind, logs = sys.argv[2], Path(sys.argv[3])
output = logs.with_name("all.log") if kind == "quiet" else None
restarts = 3 if kind == "restarting" else 0
options = LaunchOptions(
    2, max_restarts=restarts, stoppable=kind == "stoppable", log_dir=logs, output=output
)
sys.exit(run_ranks(options, sys.argv[1], sys.argv[4:]))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from moepp_megatron.config.exit_codes import HUNG, STOPPED
from moepp_megatron.runtime.launch import leave, refusal, write_status
from moepp_megatron.runtime.stop_signals import die_with_parent

die_with_parent(os.getppid())
what, folder = sys.argv[1:]
rank = os.environ["RANK"]
print("rank", rank, "says hello")
Path(folder, rank).write_text(str(os.getpid()))
if what == "end":
    leave(0)
if what == "stop":
    leave(STOPPED)
if what == "refuse together":
    leave(2)
if what == "hang":
    write_status(HUNG)
    os._exit(HUNG)
if what == "crash":
    # torchrun ends the other one as soon as it sees this.
    while not all(Path(folder, each).exists() for each in "01"):
        time.sleep(0.05)
    sys.exit(9)
if what == "refuse" and rank == "1":
    with Path(folder, "attempts").open("a") as attempts:
        attempts.write(os.environ["TORCHELASTIC_RESTART_COUNT"])
    print("error: no such thing", file=sys.stderr, flush=True)
    write_status(2)
    sys.exit(2)
if what == "refuse and fail":
    # The other one loses its peer before the one that refuses is gone.
    if rank == "1":
        print("error: no such thing", file=sys.stderr, flush=True)
        write_status(2)
        while Path(folder, "0").exists():
            time.sleep(0.05)
        sys.exit(2)
    while refusal() is None:
        time.sleep(0.05)
    Path(folder, rank).unlink()
    sys.exit(1)
if what == "late listener":
    # A request that came already is taken up here.
    while not Path(folder, "asked").exists():
        time.sleep(0.05)
    def stop(*_):
        leave(STOPPED)
    signal.signal(signal.SIGUSR1, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
time.sleep(200)
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "rank_of_test.py").write_text(RANK)
    root = str(ROOT)
    # An empty entry would be the working directory.
    paths = os.pathsep.join(filter(None, [str(tmp_path), root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    program = tmp_path / "launcher_of_test.py"
    program.write_text(LAUNCHER)
    started = []

    def launcher(what, kind="stoppable", cwd=None, is_cold=False):
        arguments = ["rank_of_test", kind, str(tmp_path / "logs"), what, str(tmp_path)]
        # A terminal's foreground, to be signalled as one: a session of its own.
        if is_cold:
            process = subprocess.Popen(
                # Like the console script it does not look in its working directory.
                [sys.executable, "-P", str(program), *arguments],
                env=environment,
                cwd=cwd,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        else:
            words = [str(program), *arguments]
            process = Heard(words, tmp_path, environment=environment, cwd=cwd, new_session=True)
        started.append(process)
        return process

    yield launcher
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def pids(folder):
    files = [folder / "0", folder / "1"]
    wait_until(lambda: all(path.exists() and path.read_text() for path in files))
    return [int(path.read_text()) for path in files]


def gone(numbers):
    for number in numbers:
        try:
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            continue
    return True


@pytest.mark.parametrize(
    ("what", "status"), [("end", 0), ("stop", 75), ("hang", 70), ("refuse together", 2)]
)
def test_what_ranks_end_with_reaches_the_caller(start, tmp_path, what, status):
    process = start(what)
    output, _ = process.communicate()
    assert process.returncode == status, output
    for rank in range(2):
        (log,) = tmp_path.glob(f"logs/*/attempt_0/{rank}/stdout.log")
        assert log.read_text() == f"rank {rank} says hello\n"
        assert f"rank {rank} says hello" in output


def ask_to_stop(process, number, folder):
    """Send a request that comes while ranks start, to torchrun as well, as Slurm does."""
    pids(folder)
    process.send_signal(number)
    for child in psutil.Process(process.pid).children():
        child.send_signal(signal.SIGTERM)
    (folder / "asked").touch()


def test_request_to_a_rank_that_still_starts_waits_for_it(start, tmp_path):
    process = start("late listener")
    ask_to_stop(process, signal.SIGTERM, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 75, output


def test_processes_that_a_shell_starts(start, tmp_path):
    """The mask of signals outlasts a start; nothing is imported from the working directory."""
    planted = tmp_path / "planted"
    planted.mkdir()
    code = "import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()"
    # Python, torchrun and torch import each of these.
    for name in ("random", "data", "uuid", "tempfile", "rank_of_test"):
        (planted / f"{name}.py").write_text(code)
    process = start("late listener", cwd=planted, is_cold=True)
    ask_to_stop(process, signal.SIGUSR1, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert list(planted.glob("*.ran")) == []
    assert "rank 1 says hello" in output


@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg)],
)
def test_ranks_that_cannot_stop_are_ended(start, tmp_path, number, send):
    process = start("sleep", "other")
    ranks = pids(tmp_path)
    send(process.pid, number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    assert gone(ranks)


def test_killed_launcher_leaves_no_orphans(start, tmp_path):
    process = start("sleep")
    ranks = pids(tmp_path)
    (agent,) = psutil.Process(process.pid).children()
    process.kill()
    wait_until(lambda: gone([agent.pid, *ranks]))


def test_second_ctrl_c_ends_at_once(start, tmp_path):
    process = start("sleep")
    ranks = pids(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    lines = iter(process.stdout.readline, "")
    said = next(line for line in lines if "stopping" in line)
    assert said == "stopping after this step; Ctrl-C again ends at once, without saving\n"
    # Not the same Ctrl-C, arriving twice.
    time.sleep(2 * SAME_INTERRUPT_S)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in output
    assert gone(ranks)


def test_one_ctrl_c_that_arrives_twice_is_one(start, tmp_path):
    """`timeout -s INT` signals its child and then the whole group, as a terminal does."""
    process = start("late listener")
    pids(tmp_path)
    process.send_signal(signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    (tmp_path / "asked").touch()
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "Traceback" not in output


def test_killed_torchrun_is_reported_as_a_shell_does(start, tmp_path):
    process = start("sleep")
    ranks = pids(tmp_path)
    (agent,) = psutil.Process(process.pid).children()
    agent.kill()
    process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    wait_until(lambda: gone(ranks))


def test_a_failed_rank_is_one_line(start, tmp_path):
    """Here in the file that all output goes to."""
    process = start("crash", "quiet")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output == ""
    text = (tmp_path / "all.log").read_text()
    assert "rank 0 says hello" in text
    assert "rank 1 says hello" in text
    assert "ended with exit status 9" in text
    assert "Traceback" not in text
    assert "ChildFailedError" not in text


def test_a_users_error_is_not_tried_again(start, tmp_path):
    process = start("refuse", "restarting")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("error: no such thing") == 1
    assert "Traceback" not in output
    assert (tmp_path / "attempts").read_text() == "0"


def test_who_fails_because_another_refused_is_not_named(start):
    process = start("refuse and fail")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert output.count("error: no such thing") == 1
    assert "exit status" not in output
