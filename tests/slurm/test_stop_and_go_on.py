"""Two-node training under Slurm: requests to stop, time limits, cancellation."""

from __future__ import annotations

import pytest

from tests.faults.harness import losses
from tests.slurm.conftest import NASTY
from tests.slurm.jobs import STEPS, Jobs

pytestmark = pytest.mark.timeout(2400)


def test_preempted_twice_with_an_unbroken_loss_curve(
    jobs: Jobs, undisturbed: dict[int, float]
) -> None:
    job = jobs.submit(run={"name": NASTY})
    job.wait_for_step(10)
    nodes = {rank: each.environ()["SLURMD_NODENAME"] for rank, each in job.ranks().items()}
    assert nodes == {0: "n1", 1: "n2"}, "one rank a node, in the order of the nodes"
    assert jobs.cluster.run("squeue", "-h", "-j", job.number, "-o", "%j").strip() == NASTY
    # To the batch script alone, as before a time limit.
    job.signal("--batch", "--signal=USR1")
    job.wait_for_restart(1)
    stopped_at = job.step
    assert (job.run / "checkpoints" / "latest").read_text().strip() == f"step_{stopped_at:08d}"
    job.wait_for_step(stopped_at + 10)
    # To every process of the step at once, as the scheduler preempts.
    job.signal("--signal=TERM")
    job.wait_for_restart(2)
    job.wait_for_end("COMPLETED")
    assert losses(job.run) == undisturbed, "the same layout continues to the bit"
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    assert "requeued (2 of at most 20 times)" in job.output
    assert not list(jobs.folder.rglob("pwned"))


@pytest.mark.slow
def test_cancelled_job_stays_cancelled(jobs: Jobs) -> None:
    job = jobs.submit(training={"train_iters": 100000})
    job.wait_for_step(3)
    job.signal()
    job.wait_for_end("CANCELLED")
    job.wait_until(lambda: not job.processes(), "gone")
    assert job.restarts == 0
    assert "requeued" not in job.output
    assert (job.run / "checkpoints" / "latest").exists(), "saved in the time that Slurm gives"


@pytest.mark.slow
def test_time_limit(jobs: Jobs) -> None:
    """Slurm asks before the limit; the job goes on, as often as it may, and then gives up."""
    job = jobs.submit(
        training={"train_iters": 100000},
        # Slurm looks every half minute and may be early by as much.
        slurm={"time": "2", "signal_before_s": 60, "max_requeues": 1},
    )
    job.wait_for_restart(1)
    reached = job.step
    assert reached > 0
    job.wait_for_end("FAILED")
    assert job.cluster.job(job.number)["ExitCode"] == "75:0"
    assert "requeued 1 times already, the most allowed" in job.output
    assert job.step > reached
    assert sorted(losses(job.run)) == list(range(1, job.step + 1))
