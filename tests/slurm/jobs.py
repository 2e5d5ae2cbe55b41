"""Jobs of the tests: the tiny expert-parallel run of tests/faults, submitted by `moepp slurm`."""

import os
import time
from pathlib import Path

import psutil

from tests.commands import MODULE, forked
from tests.faults.harness import losses, write_config
from tests.parallel.training_runs import merged

# Enough to be disturbed thrice on the way; a tenth of a second each.
STEPS = 60
# A start imports megatron-core on both "nodes"; two very busy cores take minutes.
_TIMEOUT_S = 900.0
_POLL_S = 0.1
# Between questions to the controller: each is a process.
_ASK_EVERY_S = 0.3


class Job:
    """A submitted job."""

    def __init__(self, cluster, number, run):
        self.cluster, self.number, self.run = cluster, number, run

    @property
    def state(self):
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self):
        return int(self.cluster.job(self.number)["Restarts"])

    @property
    def step(self):
        return max(losses(self.run), default=0)

    @property
    def output(self):
        """Return the output of the job so far."""
        files = sorted((self.run / "slurm").glob("*.out"))
        return "\n".join(path.read_text(errors="replace") for path in files)

    def report(self):
        """For a failing test."""
        shown = self.cluster.run("scontrol", "show", "job", self.number)
        return f"{shown}\n{self.output[-6000:]}\n{self.cluster.logs()}"

    def wait_until(self, happened, what):
        deadline = time.monotonic() + _TIMEOUT_S
        while not happened():
            assert time.monotonic() < deadline, f"not {what}:\n{self.report()}"
            time.sleep(_POLL_S)

    def wait_for_state(self, *states):
        self._ask_until(lambda: self.state in states, f"in state {' or '.join(states)}")

    def wait_for_step(self, step):
        asked = 0.0

        def reached():
            nonlocal asked
            if self.step >= step:
                return True
            if time.monotonic() - asked > 10 * _ASK_EVERY_S:
                assert self.state in ("PENDING", "RUNNING", "COMPLETING"), self.report()
                asked = time.monotonic()
            return False

        self.wait_until(reached, f"at step {step}")

    def wait_for_end(self, state):
        self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert self.state == state, self.report()

    def wait_for_restart(self, count):
        self._ask_until(lambda: self.restarts >= count, f"restarted {count} times")

    def _ask_until(self, answered, what):
        """As `wait_until`, for what the controller is asked for."""

        def happened():
            if answered():
                return True
            time.sleep(_ASK_EVERY_S)
            return False

        self.wait_until(happened, what)

    def signal(self, *options):
        self.cluster.run("scancel", *options, self.number, check=True)

    def processes(self):
        """Everything that runs for this job on any node, batch script included."""
        config = str(self.cluster.config)
        found = []
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            if environment.get("SLURM_CONF") == config and (
                environment.get("SLURM_JOB_ID") == self.number
            ):
                found.append(process)
        return found

    def ranks(self):
        """The rank processes by rank, one a node; none that is about to end."""
        found = {}
        for process in self.processes():
            try:
                parent = process.parent()
                # As torch's agent calls itself; its command line is that of the launcher.
                if parent is not None and parent.name() == "pt_elastic":
                    found[int(process.environ()["SLURM_NODEID"])] = process
            except psutil.Error:
                continue
        return found


class Jobs:
    """Writes configurations and submits them."""

    def __init__(self, cluster, data, folder, step_wait_s=60):
        self.cluster, self.data, self.folder = cluster, data, folder
        self._step_wait_s = step_wait_s
        self._submitted = []

    def config(self, sections):
        """A configuration for two nodes with one CPU rank each; `sections` are merged into it."""
        path = self.folder / "run.yaml"
        slurm = {
            # Doctor imports torch on every node; its own tests are in tests/unit/tools/doctor.
            "preflight": False,
            "nodes": 2,
            "gpus_per_node": 0,
            "exclusive": False,
            "max_restarts": 0,
        }
        steps = {"train_iters": STEPS, "micro_batch_size": 2}
        more = merged({"slurm": slurm, "training": steps}, sections)
        return write_config(path, self.data, self.folder / "run", 2, sections=more)

    @property
    def environment(self):
        """Of whoever submits; jobs inherit it."""
        folders = (Path(__file__).parent / "preload", Path(__file__).parents[2])
        path = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
        return {
            **self.cluster.environment,
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "MOEPP_STEP_WAIT": str(self._step_wait_s),
            "MOEPP_LOG_DIR": str(self.folder / "rank logs"),
        }

    def moepp(self, *arguments):
        """A `moepp` command in the folder of the jobs."""
        return forked(["-m", MODULE, *arguments], self.folder, self.environment)

    def submit(self, *overrides, **sections):
        config = self.config(sections)
        done = self.moepp("slurm", config.name, *overrides, "--submit")
        assert done.returncode == 0, done.stderr
        return self.taken(done.stdout.split()[-1])

    def taken(self, number):
        """A job that was submitted otherwise."""
        self._submitted.append(Job(self.cluster, number, self.folder / "run"))
        return self._submitted[-1]

    def cancel_all(self):
        for job in self._submitted:
            self.cluster.run("scancel", "--full", "--signal=KILL", job.number)
            self.cluster.run("scancel", job.number)
            job.wait_until(lambda job=job: not job.processes(), "gone")  # type: ignore[misc]
