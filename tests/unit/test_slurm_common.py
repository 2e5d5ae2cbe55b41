"""slurm/common.sh with stand-ins for Slurm's programs: its calls, what follows from statuses."""

import contextlib
import itertools
import os
import socket
import subprocess
from pathlib import Path

import pytest

from moepp_megatron.runtime.nodes import parse_endpoint
from tests import ROOT
from tests.commands import captured

# Logs each call, one NUL-separated record a call. srun ends with $SRUN_STATUS, after being asked to
# stop where $SRUN_STOPS says so; for a preflight it plays the nodes, sick ones named by $SICK.
SRUN = r"""#!/bin/bash
# Tasks get what is exported; with NONE, a name in place of a path is not found.
if [[ ${SLURM_EXPORT_ENV:-ALL} != ALL ]]; then exit 2; fi
# Whether all nodes still answer.
if [[ ${*: -1} == true ]]; then exit "${PROBE_STATUS:-0}"; fi
printf '%s\0' "$@" "" >>"$CALLS"
if [[ " $* " == *" preflight "* ]]; then
    for node in n1 n2; do
        status=0
        [[ " $SICK " != *" $node "* ]] || status=${SICK_STATUS:-1}
        printf '%s: checked\nmoepp-preflight %s %d\n' "$node" "$node" "$status"
    done
    exit 0
fi
if [[ " $* " == *" --plan "* || ${*: -1} == --plan ]]; then
    printf '%b' "$PLAN"
    exit "${PLAN_STATUS:-0}"
fi
cat >/dev/null # as srun, which hands its input to the nodes
if [[ -n ${CURSED:-} && " $* " == *" $CURSED "* ]]; then exit 1; fi
if [[ -n ${SRUN_STOPS:-} ]]; then kill -USR1 "$PPID"; sleep 0.3; fi
exit "${SRUN_STATUS:-0}"
"""
SCONTROL = r"""#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'n1\nn2\n' ;;
"show node") echo "NodeName=n1 Arch=x NodeAddr=${ADDRESS:-10.0.0.1} NodeHostName=h" ;;
"show job")
    echo "JobId=7 JobState=${STATE:-RUNNING} ExcNodeList=${EXCLUDED:-(null)} X=y"
    # The number of an array stands for all of its elements.
    if [[ ${*: -1} == "${SLURM_ARRAY_JOB_ID:-}" ]]; then echo "JobId=6 JobState=PENDING X=y"; fi
    ;;
listpids*) ;;
*) printf 'scontrol %s\n' "$*" >>"$CALLS.scontrol"; exit "${ORDER_STATUS:-0}" ;;
esac
"""


class Node:
    """The first node of a job of two."""

    def __init__(self, folder):
        self.folder = folder
        self.calls_file = folder / "calls"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{bin_folder}:/usr/bin:/bin",
            "CALLS": str(self.calls_file),
            "SICK": "",
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURMD_NODENAME": "n1",
        }

    def job(self, settings="", **environment):
        """Run a job; its exit status and what it said."""
        script = (
            f"set -euo pipefail\nMOEPP_ROOT={ROOT}\nMOEPP_COMMAND=(moepp)\n{settings}\n"
            'source "$MOEPP_ROOT/slurm/common.sh"\nmoepp_job "/c d/run.yaml" "run.name=$(x)"'
        ).replace("$(x)", "\\$(x)")
        done = captured(
            ["bash", "-c", script],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
        )
        return done.returncode, done.stderr

    @property
    def steps(self):
        """The arguments of each srun."""
        if not self.calls_file.exists():
            return []
        records = self.calls_file.read_text().split("\0\0")[:-1]
        return [record.split("\0") for record in records]

    @property
    def orders(self):
        """Return the commands that the controller got."""
        log = Path(f"{self.calls_file}.scontrol")
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_one_launcher_a_node_meets_at_the_first_nodes_address(node):
    status, said = node.job("MOEPP_RANKS_PER_NODE=8", SLURM_RESTART_COUNT="3")
    assert status == 0, said
    (step,) = node.steps
    text = " ".join(step)
    assert "--nodes=2 --relative=0 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none" in text
    assert "--nproc 8" in text
    assert "--nnodes 2" in text
    assert "--rdzv-endpoint 10.0.0.1:28007" in text
    assert "--resume" in step
    assert step[-3:] == ["--", "/c d/run.yaml", "run.name=$(x)"]
    assert node.orders == []


@pytest.mark.parametrize("exported", ["NONE", "PATH,HOME"])
def test_nodes_get_the_jobs_variables(node, exported):
    """Also from `sbatch --export`, which Slurm makes the rule for the job's steps."""
    status, said = node.job(SRUN_STATUS="1", SLURM_EXPORT_ENV=exported)
    assert status == 1, said
    assert node.orders == [], "every node answers, so a failure is not tried again"


def test_nodes_meet_at_an_ipv6_address(node):
    assert node.job(ADDRESS="fd00::1")[0] == 0
    (step,) = node.steps
    endpoint = step[step.index("--rdzv-endpoint") + 1]
    assert parse_endpoint(endpoint) == ("fd00::1", 28007)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "{root}/.venv/bin/moepp"),
        ({"MOEPP_PAIR": "torch2.11"}, "{root}/.venv-torch2.11/bin/moepp"),
        ({"MOEPP_VENV": "other"}, "other/bin/moepp"),
        ({"MOEPP_VENV": "missing"}, "moepp"),
        ({"MOEPP_ENV": "current"}, "moepp"),
    ],
)
def test_the_environment_of_the_set_up_is_used(node, environment, expected):
    root = node.folder / "root"
    for venv in (root / ".venv", root / ".venv-torch2.11", node.folder / "other"):
        (venv / "bin").mkdir(parents=True)
        (venv / "bin/moepp").touch(0o755)
    (root / "slurm").symlink_to(ROOT / "slurm")
    status, said = node.job(f"MOEPP_ROOT={root}; unset MOEPP_COMMAND", **environment)
    assert status == 0, said
    assert expected.format(root=root) in node.steps[0]


@pytest.mark.parametrize(
    ("status", "settings", "environment", "ends", "order", "says"),
    [
        (0, "", {}, 0, None, "done"),
        (75, "", {}, 75, "requeue", "requeued (1 of at most 20 times)"),
        (70, "", {}, 75, "requeue", "the run hung"),
        (2, "", {}, 2, None, ""),
        (3, "MOEPP_REQUEUE_ON_FAILURE=1", {}, 3, None, ""),
        (1, "", {}, 1, None, "failed with status 1; each rank's output"),
        (1, "MOEPP_REQUEUE_ON_FAILURE=1", {}, 75, "requeue", "failed with status 1; requeued"),
        (1, "", {"PROBE_STATUS": "1"}, 75, "requeue", "status 1; a node does not answer"),
        (137, "", {"PROBE_STATUS": "124"}, 75, "requeue", "status 137; a node does not answer"),
        (2, "", {"PROBE_STATUS": "1"}, 2, None, ""),
        # Killed by the request to stop itself, before it could listen.
        (138, "", {"SRUN_STOPS": "1"}, 75, "requeue", "asked to stop"),
        (75, "", {"SRUN_STOPS": "1"}, 75, "requeue", "stopped on request and saved"),
        (138, "", {}, 138, None, "failed with status 138"),
        # What bash also says of a process that it does not know.
        (127, "", {}, 127, None, "failed with status 127"),
        (75, "MOEPP_MAX_REQUEUES=2", {"SLURM_RESTART_COUNT": "2"}, 75, None, "not again"),
        (
            75,
            "MOEPP_MAX_REQUEUES=2 MOEPP_RESUME_COMMAND='sbatch again'",
            {"SLURM_RESTART_COUNT": "2"},
            75,
            None,
            "to resume: sbatch again",
        ),
        (75, "MOEPP_MAX_REQUEUES=2", {"SLURM_RESTART_COUNT": "1"}, 75, "requeue", "(2 of at most"),
        (75, "", {"STATE": "CANCELLED"}, 75, None, "the job is CANCELLED"),
        (75, "", {"STATE": "TIMEOUT"}, 75, "requeue", ""),
    ],
)
def test_what_follows_from_a_status(node, status, settings, environment, ends, order, says):
    ended, said = node.job(settings, SRUN_STATUS=str(status), **environment)
    assert ended == ends, said
    assert node.orders == ([f"scontrol {order} 20007"] if order else [])
    assert says in said


ELEMENT = {"SLURM_ARRAY_JOB_ID": "20007", "SLURM_ARRAY_TASK_ID": "3"}
"""The last element of an array, whose number is that of the array."""


def test_element_of_an_array_requeues_itself_and_no_other(node):
    ended, said = node.job(SRUN_STATUS="75", **ELEMENT)
    assert (ended, node.orders) == (75, ["scontrol requeue 20007_3"]), said


def test_element_of_an_array_avoids_its_sick_node(node):
    assert node.job(PREFLIGHT, SICK="n2", **ELEMENT)[0] == 3
    assert node.orders == [
        "scontrol requeuehold 20007_3",
        "scontrol update JobId=20007_3 ExcNodeList=n2",
        "scontrol release 20007_3",
    ]


@pytest.mark.parametrize(
    ("settings", "environment", "ends"),
    [("", {"SRUN_STATUS": "75"}, 75), ("MOEPP_PREFLIGHT=(check)", {"SICK": "n2"}, 3)],
)
def test_job_that_slurm_does_not_requeue_says_how_to_resume(node, settings, environment, ends):
    """As with --no-requeue."""
    ended, said = node.job(
        f"MOEPP_RESUME_COMMAND='sbatch again'\n{settings}", ORDER_STATUS="1", **environment
    )
    assert ended == ends, said
    assert said.splitlines()[-1].endswith("not requeued; to resume: sbatch again")
    assert len(node.orders) == 1


@pytest.mark.parametrize(("limit_s", "ends"), [(600, 2), (601, 0), (0, 0)])
def test_time_limit_that_leaves_no_time_to_train(node, limit_s, ends):
    """0: this Slurm does not say when the job ends."""
    times = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": str(1000 + limit_s)}
    ended, said = node.job("MOEPP_SIGNAL_BEFORE=600", **(times if limit_s else {}))
    assert ended == ends, said
    assert bool(node.steps) == (ends == 0)
    assert ("the time limit (600 s) must be above the 600 s" in said) == (ends == 2)


def test_port_in_use_is_left_out(node):
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            with contextlib.suppress(OSError):
                server = socket.create_server(("127.0.0.1", 20000 + number))
                stack.enter_context(server)
                break
        status, said = node.job(ADDRESS="127.0.0.1", SLURM_JOB_ID=str(number))
    assert status == 0, said
    (step,) = node.steps
    endpoint = step[step.index("--rdzv-endpoint") + 1]
    assert parse_endpoint(endpoint)[1] > 20000 + number


PREFLIGHT = "MOEPP_PREFLIGHT=(check 'two words')"


def test_healthy_nodes_are_checked_and_then_train(node):
    status, said = node.job(PREFLIGHT)
    assert status == 0, said
    check, train = node.steps
    assert check[-2:] == ["check", "two words"]
    assert "train" in train
    assert "n2: checked" in said


def test_sick_node_is_excluded_besides_those_that_were(node):
    status, said = node.job(PREFLIGHT, SICK="n2", EXCLUDED="n9")
    assert status == 3
    assert len(node.steps) == 1, "nothing was trained"
    assert node.orders == [
        "scontrol requeuehold 20007",
        "scontrol update JobId=20007 ExcNodeList=n9,n2",
        "scontrol release 20007",
    ]
    assert "preflight failed on n2 (exit 1)" in said


@pytest.mark.parametrize(
    ("environment", "ends", "says"),
    [
        ({"SICK": "n1 n2"}, 3, "every node fails"),
        ({"SICK": "n2", "SICK_STATUS": "127"}, 2, "the preflight command itself is wrong"),
        ({"SICK": "n2", "SLURM_RESTART_COUNT": "20"}, 3, "not again"),
    ],
)
def test_preflight_that_excludes_nobody(node, environment, ends, says):
    status, said = node.job(PREFLIGHT, **environment)
    assert (status, node.orders, len(node.steps)) == (ends, [], 1), said
    assert says in said


IMAGE = "MOEPP_CONTAINER_IMAGE='/my images/x.sqsh' MOEPP_CONTAINER_MOUNTS=('/a b:/c' /d:/e)"


def test_pyxis(node):
    node.job(f"MOEPP_CONTAINER=pyxis\n{IMAGE}")
    (step,) = node.steps
    here = os.path.realpath(node.folder)
    assert "--container-image=/my images/x.sqsh" in step
    assert f"--container-mounts={here}:{here},/a b:/c,/d:/e" in step
    assert step.index(f"--container-workdir={here}") < step.index("bash")


def test_apptainer(node):
    node.job(f"MOEPP_CONTAINER=apptainer\n{IMAGE}")
    (step,) = node.steps
    here = os.path.realpath(node.folder)
    start = step.index("apptainer")
    assert step[start : step.index("bash")] == [
        *["apptainer", "exec", "--nv", "--pwd", here, "--bind", here],
        *["--bind", "/a b:/c", "--bind", "/d:/e", "/my images/x.sqsh"],
    ]


PLAN = "n8_ep8_b16 8\\nn16_ep8_b16 16\\n"


def scaling(node, **environment):
    """slurm/scaling.sbatch on the two nodes, 8 ranks each."""
    done = captured(
        ["bash", str(ROOT / "slurm/scaling.sbatch"), "/c d/run.yaml", "/o ut", "run.name=$(x)"],
        env={
            **node.environment,
            "MOEPP_ROOT": str(ROOT),
            "MOEPP_RANKS_PER_NODE": "8",
            "MOEPP_COMMAND": "moepp",
            "PLAN": PLAN,
            **environment,
        },
        cwd=node.folder,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def test_scaling_measures_each_point_on_its_nodes(node):
    status, said = scaling(node)
    assert status == 0, said
    plan, first, second, collect = node.steps
    command = ["moepp", "scale", "/c d/run.yaml", "--out", "/o ut", "--nproc", "8,16"]
    assert plan[-9:] == [*command, "run.name=$(x)", "--plan"]
    assert "--nodes=1" in first
    assert first[first.index("scale") - 1 :] == [*command, "run.name=$(x)", "--point", "n8_ep8_b16"]
    assert "--nodes=2" in second
    assert second[-8:-2] == [
        *["--point", "n16_ep8_b16", "--nnodes", "2"],
        *["--rdzv-id", second[-3]],
    ]
    assert second[-2:] == ["--rdzv-endpoint", "10.0.0.1:28007"]
    assert collect[-9:] == [*command, "run.name=$(x)", "--collect"]


def test_scaling_continues_after_a_failed_point(node):
    status, said = scaling(node, CURSED="n8_ep8_b16")
    assert status == 1
    assert "scaling: n8_ep8_b16 failed" in said
    _, _, second, collect = node.steps
    assert "n16_ep8_b16" in second
    assert collect[-1] == "--collect"


def test_scaling_with_a_wrong_configuration_starts_nothing(node):
    status, _ = scaling(node, PLAN_STATUS="2", PLAN="")
    assert status == 2
    assert len(node.steps) == 1
    status, said = scaling(node, PLAN="n32_ep8_b16 32\\n")
    assert status == 1
    assert "n32_ep8_b16 wants 4 nodes; left out" in said
