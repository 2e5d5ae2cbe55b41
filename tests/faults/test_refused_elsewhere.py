"""A machine that refuses: the others, which would wait for it, end with its status and reason."""

import os
import socket

import pytest

from moepp_megatron.config import load_config
from moepp_megatron.observe.status import CLAIM
from moepp_megatron.training.run_folder import RunFolder, Start
from tests.commands import MODULE, Begun, program
from tests.faults.harness import write_config
from tests.ports import free_port

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]
# Far below the 15 minutes that the others would wait; nothing is timed.
HANG_S = 240.0


MACHINE = """
import sys
from moepp_megatron.runtime.launch import LaunchOptions, run_ranks
from moepp_megatron.runtime.nodes import Nodes
number, port, folder = sys.argv[1:]
nodes = Nodes(2, int(number), "127.0.0.1", int(port))
sys.exit(run_ranks(LaunchOptions(1, nodes), "rank_of_test", [folder]))
"""
RANK = """
import os, sys, time
from pathlib import Path
machine, folder = os.environ["MOEPP_NODE_RANK"], Path(sys.argv[1])
(folder / machine).touch()
while not all((folder / each).exists() for each in "01"):
    time.sleep(0.05)
if machine == "1":
    sys.exit(9)
time.sleep(600)
"""
SECOND = """
import json, os, threading, time
from torch.distributed import PrefixStore, TCPStore, run
from moepp_megatron.runtime import agent
from moepp_megatron.runtime.launch import MACHINES
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
seen = PrefixStore("moepp moepp", store)
def first():
    while seen.add("compared", 0) == 0:
        time.sleep(0.05)
    seen.add("compared", 1)
threading.Thread(target=first, daemon=True).start()
run.main = lambda: print(seen.add("compared", 0), "have compared", flush=True)
nodes = {"count": 2, "rank": 1, "host": "127.0.0.1", "port": store.port}
os.environ[MACHINES] = json.dumps([nodes, {}])
agent.main()
os._exit(0)
"""


class Starts:
    """Starts of one run as its machines, all on this one."""

    def __init__(self, folder, data):
        self.folder, self.run = folder, folder / "run"
        self.config = write_config(folder / "run.yaml", data, self.run, 2, train_iters=3)
        self.port = free_port()
        self.started = []

    def machine(self, number, *words, nnodes=2, numbered=True):
        options = ["--nnodes", str(nnodes), "--rdzv-endpoint", f"127.0.0.1:{self.port}"]
        options += ["--node-rank", str(number)] if numbered else []
        words = ("train", str(self.config), *words, *options, "--resume", "--max-restarts", "3")
        self.begin(["-m", MODULE, *words])

    def begin(self, words):
        output = self.folder / f"{len(self.started)}.log"
        environment = {name: value for name, value in os.environ.items() if name != CLAIM}
        paths = [str(self.folder), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.started.append(Begun(words, output, environment=environment))

    def ended(self):
        statuses = [process.wait(HANG_S) for process in self.started]
        logs = [self.folder / f"{number}.log" for number in range(len(statuses))]
        texts = [log.read_text() for log in logs]
        assert not any("Traceback" in text for text in texts), texts
        return list(zip(statuses, texts, strict=True))


@pytest.fixture
def starts(tmp_path, data):
    starts = Starts(tmp_path, data)
    yield starts
    for process in starts.started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_launcher_that_refuses_ends_the_other_machine(starts, refusing):
    starts.machine(refusing, "moe.tau=-1")
    starts.machine(1 - refusing)
    (status, said), (other_status, other_said) = starts.ended()
    assert (status, other_status) == (2, 2), said + other_said
    assert f"another machine has ended this run, {socket.gethostname()}: moe.tau (-1" in other_said
    assert said.count("error:") == other_said.count("error:") == 1


def test_a_rank_that_refuses_ends_the_other_machine(starts):
    """torchrun numbers the machines, so a rank claims the folder, which another run holds."""
    with RunFolder(load_config(starts.config)).claim(Start(name="another")):
        for number in range(2):
            starts.machine(number, numbered=False)
        (status, said), (other_status, other_said) = starts.ended()
    assert (status, other_status) == (2, 2), said + other_said
    assert "must not be in use" in said
    assert "must not be in use" in other_said
    assert "another machine has ended this run" in said + other_said


@pytest.mark.parametrize(
    ("words", "nnodes", "says"),
    [(["training.seed=5"], 2, "training.seed ("), ([], 4, "--nnodes (")],
)
def test_machines_that_are_not_alike(starts, words, nnodes, says):
    starts.machine(0)
    starts.machine(1, *words, nnodes=nnodes)
    ended = starts.ended()
    assert [status for status, _ in ended] == [2, 2], ended
    assert all(says in said and "must be the same on all machines" in said for _, said in ended)


def test_machines_meet_when_all_have_compared(tmp_path):
    """Ranks of a machine with another number of machines must not join before all have compared."""
    (tmp_path / "second.py").write_text(SECOND)
    assert program(tmp_path / "second.py").stdout == "2 have compared\n"


def test_a_machine_whose_ranks_fail_for_good_ends_the_other(starts):
    """The other's rank would wait for longer than a test: it has not met the first one yet."""
    (starts.folder / "rank_of_test.py").write_text(RANK)
    (starts.folder / "machine.py").write_text(MACHINE)
    for number in "01":
        words = [number, str(starts.port), str(starts.folder)]
        starts.begin([str(starts.folder / "machine.py"), *words])
    (status, said), (other_status, other_said) = starts.ended()
    assert (status, other_status) == (1, 1), said + other_said
    assert "ended with exit status 9" in other_said
    assert f"has ended this run, {socket.gethostname()}: rank" in said
