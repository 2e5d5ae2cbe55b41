"""Ranks that crash, and ranks that die without Slurm's knowledge."""

import pytest

from tests.commands import slowdown
from tests.faults.harness import losses

pytestmark = pytest.mark.timeout(2400)
# A node whose processes are gone never answers, for which Slurm waits this long.
KILL_WAIT_S = 5
# Longer than the node that writes the report needs after the other on a busy machine.
STEP_WAIT_S = 30


def test_dead_ranks_start_again_and_crashed_ones_once(jobs):
    """First everything on a node dies, but its daemon answers: Slurm sees nothing wrong."""
    # Nodes must also meet within it at the start, which takes them 4 s on idle cores.
    timeout_s = max(20, round(6 * slowdown()))
    job = jobs.submit(
        slurm={"max_restarts": 1, "restart_timeout_s": timeout_s}, training={"train_iters": 100000}
    )
    job.wait_for_step(6)
    jobs.cluster.kill_steps("n2")
    job.wait_for_state("PENDING")
    assert (
        f"a node did not come back within {timeout_s} s after a failure; requeued (1 of at"
        in job.output
    )
    job.wait_for_restart(1)
    job.wait_for_step(job.step + 1)
    # Now a rank crashes, and the launcher sees it.
    first = job.ranks()
    first[1].kill()
    reached = job.step

    def has_restarted():
        # One look: a rank may end between two.
        now = job.ranks()
        return now.keys() == {0, 1} and now[1] != first[1]

    job.wait_until(has_restarted, "restarted")
    job.wait_for_step(reached + 5)
    # A node counts the restarts that its own ranks cause.
    job.ranks()[1].kill()
    job.wait_for_end("FAILED")
    assert job.restarts == 1, "a crash is no reason to start the job again"
    job.wait_until(lambda: not job.processes(), "gone")
    assert sorted(losses(job.run)) == list(range(1, job.step + 1))
    assert "each rank's output" in job.output
