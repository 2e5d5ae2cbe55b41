"""Nodes that die, nodes that are sick, ranks that crash."""

from __future__ import annotations

import pytest

from tests.faults.harness import losses
from tests.slurm.jobs import STEPS, Jobs

pytestmark = pytest.mark.timeout(2400)
# A lost node's step never answers, for which Slurm waits this long.
KILL_WAIT_S = 5


def test_job_waits_for_a_lost_node(jobs: Jobs, undisturbed: dict[int, float]) -> None:
    job = jobs.submit()
    job.wait_for_step(10)
    jobs.cluster.kill_node("n2")
    job.wait_for_state("PENDING")
    jobs.cluster.wait_for_nodes("down", ("n2",))
    # Its node is back before anything else could have let it start.
    assert job.state == "PENDING"
    jobs.cluster.start_node("n2")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert losses(job.run) == undisturbed


def test_job_does_not_wait_for_ranks_that_slurm_does_not_miss(jobs: Jobs) -> None:
    """Everything on a node dies, but its daemon answers: Slurm sees nothing wrong with the job."""
    # Nodes must also meet within it at the start, on a machine that may be busy.
    job = jobs.submit(
        slurm={"max_restarts": 3, "restart_timeout_s": 60}, training={"train_iters": 40}
    )
    job.wait_for_step(10)
    jobs.cluster.kill_steps("n2")
    job.wait_for_state("PENDING")
    assert "did not come back within 60 s after a failure" in job.output
    assert "a node did not come back within 60 s after a failure; requeued (1 of at" in job.output
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert sorted(losses(job.run)) == list(range(1, 41))


@pytest.mark.slow
def test_job_goes_on_with_the_nodes_that_are_left(jobs: Jobs) -> None:
    job = jobs.submit(slurm={"min_nodes": 1}, parallel={"expert_model_parallel_size": 1})
    job.wait_for_step(10)
    assert len(job.ranks()) == 2
    jobs.cluster.kill_node("n2")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "start 2 on n1, 1 nodes" in job.output
    assert sorted(losses(job.run)) == list(range(1, STEPS + 1))


def test_node_that_fails_preflight_is_named_and_avoided(jobs: Jobs) -> None:
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


def test_job_does_not_start_where_every_node_fails_preflight(jobs: Jobs) -> None:
    job = jobs.submit(slurm={"preflight": True, "preflight_command": ["bash", "-c", "exit 1"]})
    job.wait_for_end("FAILED")
    assert job.cluster.job(job.number)["ExitCode"] == "3:0"
    assert "every node fails" in job.output
    assert job.restarts == 0
    assert not (job.run / "metrics.jsonl").exists()


def test_wrong_preflight_command_excludes_nobody(jobs: Jobs) -> None:
    job = jobs.submit(slurm={"preflight": True, "preflight_command": ["no-such-command"]})
    job.wait_for_end("FAILED")
    assert "the preflight command itself is wrong (exit 127 on n1)" in job.output
    assert job.cluster.job(job.number)["ExcNodeList"] == "(null)"


def test_crashed_rank_restarts_once_and_leaves_no_orphans(
    jobs: Jobs, undisturbed: dict[int, float]
) -> None:
    job = jobs.submit(slurm={"max_restarts": 1}, training={"train_iters": 100000})
    job.wait_for_step(20)
    first = job.ranks()
    first[1].kill()
    reached = job.step

    def has_restarted() -> bool:
        # One look: a rank may end between two.
        now = job.ranks()
        return now.keys() == {0, 1} and now[1] != first[1]

    job.wait_until(has_restarted, "restarted")
    job.wait_for_step(reached + 30)
    # A node counts the restarts that its own ranks cause.
    job.ranks()[1].kill()
    job.wait_for_end("FAILED")
    assert job.restarts == 0, "a crash is no reason to start the job again"
    job.wait_until(lambda: not job.processes(), "gone")
    assert sorted(losses(job.run)) == list(range(1, job.step + 1))
    assert "each rank's output" in job.output
