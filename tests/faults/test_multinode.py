"""launch/multinode.sh on two hosts: network namespaces joined by a wire."""

import hashlib
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests import ROOT
from tests.faults.harness import descendants, losses, training, write_config

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 60
# The second holds for a save, which the cut may fall into.
HANG_TIMEOUT_S, SLOW_PHASE_TIMEOUT_S = 5.0, 20.0
_TIMEOUT_S = 280.0
# The threads of a rank decide how its matrix products are summed, to the last bit. By default ranks
# share out their host's cores: one host between two of them, two hosts to one each.
_THREADS = "1"


def fake_environment(folder):
    """An environment that launch/env.sh finds ready, with this Python and the code under test."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").symlink_to(sys.executable)
    moepp = folder / "bin/moepp"
    moepp.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moepp_megatron.cli.main "$@"\n')
    moepp.chmod(0o755)
    stamp = f"root {ROOT}\n"
    for name in ("pyproject.toml", "constraints.txt"):
        stamp += f"{hashlib.sha256((ROOT / name).read_bytes()).hexdigest()}  -\n"
    (folder / ".moepp-stamp").write_text(stamp)
    return folder


class Hosts:
    """Two network namespaces, joined by a wire."""

    addresses = ("10.97.0.1", "10.97.0.2")

    def __init__(self, folder):
        self.folder = folder
        self.names = [f"moepp-{os.getpid()}-{index}" for index in range(2)]
        self.wires = [f"mp{os.getpid() % 100000}-{index}" for index in range(2)]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": _THREADS,
            "MOEPP_VENV": str(fake_environment(folder / "venv")),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "TMPDIR": str(folder),
        }
        self._started = []

    def build(self):
        """Make them; raises CalledProcessError where that is not allowed."""
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", self.wires[0], "type", "veth", "peer", "name", self.wires[1])
        for name, wire, address in zip(self.names, self.wires, self.addresses, strict=True):
            _ip("link", "set", wire, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", wire)
            _ip("-n", name, "link", "set", wire, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def remove(self):
        for process in self._started:
            for each in descendants(process.pid):
                each.kill()
            process.kill()
            process.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.wires[0]], capture_output=True)

    def cut(self):
        """Pull the plug of host 1: no packet comes through, and nobody is notified."""
        _ip("-n", self.names[1], "link", "set", self.wires[1], "down")

    def mend(self):
        _ip("-n", self.names[1], "link", "set", self.wires[1], "up")

    def start(self, host, config):
        """Run launch/multinode.sh on a host; its output goes to a file."""
        command = ["ip", "netns", "exec", self.names[host], str(ROOT / "launch/multinode.sh")]
        command += [str(config), "--nproc", "1", "--nnodes", "2", "--node-rank", str(host)]
        command += ["--rdzv-endpoint", f"{self.addresses[0]}:29400"]
        with (self.folder / f"host_{host}.log").open("ab") as output:
            process = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, cwd=self.folder
            )
        self._started.append(process)
        return process

    def logs(self):
        files = sorted(self.folder.glob("host_*.log"))
        return "\n".join(f"--- {each.name}\n{each.read_text()[-4000:]}" for each in files)


@pytest.fixture
def hosts(tmp_path):
    if shutil.which("ip") is None:
        pytest.skip("no ip command here (package iproute2)")
    hosts = Hosts(tmp_path)
    try:
        try:
            hosts.build()
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()
            pytest.skip(f"network namespaces are not allowed here: {reason}")
        yield hosts
    finally:
        hosts.remove()


def test_host_that_is_cut_off_and_comes_back(hosts, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", _THREADS)
    alone = write_config(tmp_path / "alone.yaml", data, tmp_path / "alone", 2, train_iters=STEPS)
    with training(alone, 2) as process:
        assert process.wait() == 0, alone.with_suffix(".log").read_text()[-3000:]
    run = tmp_path / "run"
    resilience = {
        "hang_timeout_s": HANG_TIMEOUT_S,
        "hang_slow_phase_timeout_s": SLOW_PHASE_TIMEOUT_S,
    }
    config = write_config(
        tmp_path / "run.yaml", data, run, 2, sections={"resilience": resilience}, train_iters=STEPS
    )

    processes = [hosts.start(host, config) for host in range(2)]

    def wait_until(happened, what, timeout=_TIMEOUT_S):
        deadline = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < deadline, f"not {what}:\n{hosts.logs()}"
            assert all(each.poll() in (None, 0) for each in processes), hosts.logs()
            time.sleep(0.02)

    wait_until(lambda: max(losses(run), default=0) >= 10, "at step 10")
    hosts.cut()
    cut_at = max(losses(run))
    # Half of the timeout for the watchdogs to look and to wait for each other's stacks, and a
    # minute because this machine may be busy; the default of megatron-core and torch is ten.
    allowed = 1.5 * SLOW_PHASE_TIMEOUT_S + 60
    wait_until(lambda: list(run.glob("hangs/*/report.txt")), "detected", allowed)
    assert max(losses(run)) <= cut_at + 1, "no step without the other host"
    hosts.mend()
    for process in processes:
        wait_until(lambda process=process: process.poll() == 0, "done")  # type: ignore[misc]
    assert losses(run) == losses(tmp_path / "alone"), "two hosts compute what one does, to the bit"
    assert list((tmp_path / f"moepp-logs-{os.getuid()}").rglob("attempt_*/0/stdout.log")), (
        "each rank's own output"
    )


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
