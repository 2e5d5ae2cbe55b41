"""Preflight, batch scripts of slurm/ submitted by hand, and ranks that srun itself starts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moepp_megatron.config.exit_codes import STOPPED
from tests.faults.harness import losses
from tests.slurm.jobs import STEPS

pytestmark = pytest.mark.timeout(2400)

ROOT = Path(__file__).resolve().parents[2]
# These nodes have no GPUs to ask for.
OPTIONS = ["--nodes=2", "--gpus-per-node=0", "--mem=1"]


def output_folder(jobs):
    """Return the output folder of the job's run."""
    folder = jobs.folder / "run/slurm"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def environment(jobs):
    """Of a user of an installation: `moepp` is a command, from the code under test."""
    moepp = jobs.folder / "moepp"
    moepp.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m moepp_megatron.cli.main "$@"\n')
    moepp.chmod(0o755)
    return {
        **jobs.environment,
        "MOEPP_ROOT": str(ROOT),
        "PATH": f"{jobs.folder}:{os.environ['PATH']}",
        # The names of these nodes are no addresses.
        "MASTER_ADDR": "127.0.0.1",
    }


def sbatch(jobs, *arguments):
    """Submit."""
    folder = output_folder(jobs)
    done = subprocess.run(
        ["sbatch", f"--output={str(folder).replace('%', '%%')}/%j.out", *OPTIONS, *arguments],
        env=environment(jobs),
        cwd=jobs.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return jobs.taken(done.stdout.split()[-1])


def test_preflight_names_the_sick_node(jobs):
    script = str(ROOT / "slurm/preflight.sbatch")
    check = "[[ $SLURMD_NODENAME == n1 ]] || { echo too hot; exit 5; }"
    job = sbatch(jobs, script, "bash", "-c", check)
    job.wait_for_end("FAILED")
    assert job.cluster.job(job.number)["ExitCode"] == "3:0"
    assert "n2: too hot" in job.output
    assert "preflight failed on n2 (exit 5)" in job.output
    healthy = sbatch(jobs, script, "bash", "-c", "true")
    healthy.wait_for_end("COMPLETED")
    assert "preflight: all 2 nodes passed" in healthy.output


def test_node_that_fails_preflight_is_named_and_avoided(jobs):
    check = 'if [[ $SLURMD_NODENAME == n2 ]]; then echo "GPU 3: ECC errors (12)"; exit 1; fi'
    job = jobs.submit(
        slurm={"min_nodes": 1, "preflight": True, "preflight_command": ["bash", "-c", check]},
        parallel={"expert_model_parallel_size": 1},
        training={"train_iters": 5},
    )
    job.wait_for_end("COMPLETED")
    assert "n2: GPU 3: ECC errors (12)" in job.output
    assert "preflight failed on n2 (exit 1)" in job.output
    assert job.cluster.job(job.number)["ExcNodeList"] == "n2"
    # The first start ended before a rank did: all steps are the second's.
    first, second = job.output.split("start 2 on n1, 1 nodes")
    assert "step 1/5" not in first
    assert "step 1/5" in second


def test_job_does_not_start_where_every_node_fails_preflight(jobs):
    job = jobs.submit(slurm={"preflight": True, "preflight_command": ["bash", "-c", "exit 1"]})
    job.wait_for_end("FAILED")
    assert job.cluster.job(job.number)["ExitCode"] == "3:0"
    assert "every node fails" in job.output
    assert job.restarts == 0
    assert not (job.run / "metrics.jsonl").exists()


def test_wrong_preflight_command_excludes_nobody(jobs):
    job = jobs.submit(slurm={"preflight": True, "preflight_command": ["no-such-command"]})
    job.wait_for_end("FAILED")
    assert "the preflight command itself is wrong (exit 127 on n1)" in job.output
    assert job.cluster.job(job.number)["ExcNodeList"] == "(null)"


@pytest.mark.slow
def test_scaling_over_node_counts(jobs):
    """One rank a node, 1 and 2 nodes; a second submission measures only what is missing."""
    config = jobs.config({"parallel": {"expert_model_parallel_size": 1}})
    folder = jobs.folder / "scaling"
    script = str(ROOT / "slurm/scaling.sbatch")
    arguments = [str(config), str(folder), "--rounds", "2"]
    job = sbatch(jobs, script, *arguments, "--mode", "strong")
    job.wait_for_end("COMPLETED")
    records = json.loads((folder / "scale.json").read_text())
    assert [(r["nproc"], r["kind"]) for r in records] == [
        (nproc, kind) for nproc in (1, 2) for kind in ("moepp", "vanilla")
    ]
    assert records[-1]["layout"] == "tp=1,pp=1,cp=1,ep=2,etp=1"
    assert records[-1]["a2a_bytes"] > 0
    assert (folder / "logs/n2_tp1-pp1-cp1-ep2-etp1_b8.node1.log").exists(), "two launchers"
    again = sbatch(jobs, script, *arguments, "--mode", "strong,weak")
    again.wait_for_end("COMPLETED")
    assert "n2_tp1-pp1-cp1-ep2-etp1_b16 on 2 nodes" in again.output
    assert "_b8 on" not in again.output.split(f"moepp job {again.number}: ", 1)[1]
    assert len(json.loads((folder / "scale.json").read_text())) == 8


@pytest.mark.slow
def test_ranks_that_srun_starts(jobs, undisturbed):
    config = jobs.config({})
    command = ["moepp", "train", str(config)]
    job = sbatch(jobs, "--ntasks-per-node=1", f"--wrap=srun {shlex.join(command)}")
    job.wait_for_end("COMPLETED")
    assert losses(job.run) == undisturbed
    assert len(undisturbed) == STEPS


def test_interrupted_srun_saves_and_its_last_line_continues(jobs):
    config = jobs.config({"training": {"train_iters": 100000}})
    output = output_folder(jobs) / "srun.out"
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "moepp", "train", str(config)]

    def listed():
        return set(jobs.cluster.run("squeue", "-h", "-o", "%i").split())

    # Jobs that have ended, other tests' too, are listed for a while.
    earlier = listed()

    def interrupted(command, how):
        """Return the line printed after a step."""
        # As --disable-status: srun keeps its first Ctrl-C for itself otherwise.
        env = {**environment(jobs), "SLURM_DISABLE_STATUS": "1"}
        with output.open("w") as file:
            srun = subprocess.Popen(command, env=env, cwd=jobs.folder, stdout=file, stderr=file)
        job = None
        try:
            while not (numbers := listed() - earlier):
                assert srun.poll() is None, output.read_text()
                time.sleep(0.05)
            (number,) = numbers
            earlier.add(number)
            job = jobs.taken(number)
            job.wait_for_step(job.step + 1)
            how(srun, job)
            assert srun.wait(300) == STOPPED, job.report()
        finally:
            srun.kill()
            srun.wait()
        assert (job.run / "checkpoints/latest").read_text().strip() == f"step_{job.step:08d}"
        lines = output.read_text().splitlines()
        assert f"stopped on request at step {job.step}, saved" in lines
        return lines

    lines = interrupted(command, lambda srun, job: srun.send_signal(signal.SIGINT))
    resume_command = shlex.split(lines[lines.index("to resume:") + 1])
    assert resume_command[:3] == ["srun", "--nodes=2", "--ntasks=2"]
    lines = interrupted(resume_command, lambda srun, job: job.signal("--signal=INT"))
    assert any(line.startswith("resumed from step ") for line in lines)
