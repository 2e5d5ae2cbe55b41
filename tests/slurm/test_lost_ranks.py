"""Ranks that crash, and ranks that die without Slurm's knowledge."""

from __future__ import annotations

import pytest

from tests.faults.harness import losses
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.timeout(2400)
# A node whose processes are gone never answers, for which Slurm waits this long.
KILL_WAIT_S = 5
# Longer than the node that writes the report needs after the other on a busy machine.
STEP_WAIT_S = 30


def test_job_does_not_wait_for_ranks_that_slurm_does_not_miss(jobs: Jobs) -> None:
    """Everything on a node dies, but its daemon answers: Slurm sees nothing wrong with the job."""
    # Nodes must also meet within it at the start, on a machine that may be busy.
    job = jobs.submit(
        slurm={"max_restarts": 3, "restart_timeout_s": 30}, training={"train_iters": 25}
    )
    job.wait_for_step(6)
    jobs.cluster.kill_steps("n2")
    job.wait_for_state("PENDING")
    assert "did not come back within 30 s after a failure" in job.output
    assert "a node did not come back within 30 s after a failure; requeued (1 of at" in job.output
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert sorted(losses(job.run)) == list(range(1, 26))


def test_crashed_rank_restarts_once_and_leaves_no_orphans(jobs: Jobs) -> None:
    job = jobs.submit(slurm={"max_restarts": 1}, training={"train_iters": 100000})
    job.wait_for_step(6)
    first = job.ranks()
    first[1].kill()
    reached = job.step

    def has_restarted() -> bool:
        # One look: a rank may end between two.
        now = job.ranks()
        return now.keys() == {0, 1} and now[1] != first[1]

    job.wait_until(has_restarted, "restarted")
    job.wait_for_step(reached + 5)
    # A node counts the restarts that its own ranks cause.
    job.ranks()[1].kill()
    job.wait_for_end("FAILED")
    assert job.restarts == 0, "a crash is no reason to start the job again"
    job.wait_until(lambda: not job.processes(), "gone")
    assert sorted(losses(job.run)) == list(range(1, job.step + 1))
    assert "each rank's output" in job.output
