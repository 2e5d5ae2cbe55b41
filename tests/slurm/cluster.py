"""Debian's Slurm as a cluster of two nodes on this machine, without munge and without root's files.

Both nodes are slurmd processes of this machine with ports, names and spool folders of their own.
Authentication is off (`auth/none`), so the daemons listen on the loopback address only.
"""

import getpass
import itertools
import os
import shutil
import signal
import subprocess
import time

import psutil

from tests.ports import free_port

NODES = ("n1", "n2")
_STARTED = itertools.count()
_CONFIG = """\
ClusterName=moepp
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/none
CredType=cred/none
# A requeued job waits as long as its old credentials live: 120 s by default.
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
# Containers of test machines seldom own a cgroup tree.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
# After which a node that does not answer is down; a healthy one on a busy machine takes seconds.
SlurmdTimeout=20
KillWait={kill_wait_s}
MinJobAge=3600
# Ports follow from the job's number: test runs at the same time must not have the same.
FirstJobId={first_job}
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_1} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={port_2} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def missing_programs():
    """The programs of Slurm that are not installed here."""
    return [name for name in _PROGRAMS if _program(name) is None]


class Cluster:
    """A running cluster."""

    def __init__(self, folder, kill_wait_s=30):
        self.folder = folder
        self.config = folder / "slurm.conf"
        (folder / "state").mkdir(parents=True)
        for node in NODES:
            (folder / f"spool.{node}").mkdir()
        ports = [free_port() for _ in range(3)]
        self.config.write_text(
            _CONFIG.format(
                folder=folder,
                user=getpass.getuser(),
                controller_port=ports[0],
                first_job=1 + os.getpid() + 100 * next(_STARTED),
                kill_wait_s=kill_wait_s,
                port_1=ports[1],
                port_2=ports[2],
            )
        )
        self.environment = {**os.environ, "SLURM_CONF": str(self.config)}
        self._daemons = {}

    def start(self):
        """Start the controller and both nodes, and wait until the nodes are idle."""
        self._start("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes("idle")

    def start_node(self, node):
        """Start a node's daemon."""
        self._start("slurmd", "-N", node)

    def kill_node(self, node):
        """A node dies: its daemon, and everything that runs on it, at the same moment."""
        self._kill([self._daemons.pop(node).pid, *self._on_node(node)])

    def kill_steps(self, node):
        """Everything that runs on a node dies; its daemon keeps running and reports nothing."""
        self._kill(self._on_node(node))

    def _on_node(self, node):
        """Return the job steps that Slurm has started on a node, and their processes."""
        doomed = []
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            on_node = environment.get("SLURMD_NODENAME") == node
            if on_node and environment.get("SLURM_CONF") == str(self.config):
                doomed.append(process.pid)
        # slurmstepd renames itself and hides its environment.
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or ())
            if command.startswith("slurmstepd:") and self._is_step_of(process, node):
                doomed.append(process.pid)
        return doomed

    @staticmethod
    def _kill(doomed):
        for pid in doomed:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def heal(self):
        """Start what a test has killed."""
        for node in NODES:
            if node not in self._daemons:
                self.start_node(node)

    def stop(self):
        """Cancel everything and end the daemons."""
        self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        self.run("scancel", f"--user={getpass.getuser()}")
        deadline = time.monotonic() + 30
        while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, program, *arguments, check=False):
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            [_program(program) or program, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{program}: {done.stderr}"
        return done.stdout

    def job(self, job):
        """Return the controller's description of a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", job, check=True)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait_for_nodes(self, state, nodes=NODES):
        deadline = time.monotonic() + 240
        while True:
            shown = self.run("sinfo", "-h", "-N", "-n", ",".join(nodes), "-o", "%T").split()
            # A star: it does not answer.
            states = [each.rstrip("*") for each in shown]
            if states and all(each == state for each in states):
                return
            assert time.monotonic() < deadline, f"{nodes} are {states}, not {state}:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self):
        """The ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, program, *arguments):
        name = arguments[-1] if program == "slurmd" else program
        # In the foreground (-D), so that the daemon is this process's child and dies with it.
        command = [_program(program) or program, "-D", "-f", str(self.config), *arguments]
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output
            )

    def _is_step_of(self, process, node):
        try:
            # Another cluster of this machine has nodes of the same names.
            log = str(self.folder.resolve() / f"slurmd.{node}.log")
            return any(each.path == log for each in process.open_files())
        except psutil.Error:
            return False


def _program(name):
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    return shutil.which(name, path=path)
