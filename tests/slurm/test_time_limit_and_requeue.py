"""Two-node training under Slurm: time limits, cancellation."""

import pytest

from tests.faults.harness import losses

pytestmark = pytest.mark.timeout(2400)


@pytest.mark.slow
def test_cancelled_job_stays_cancelled(jobs):
    job = jobs.submit(training={"train_iters": 100000})
    job.wait_for_step(3)
    job.signal()
    job.wait_for_end("CANCELLED")
    job.wait_until(lambda: not job.processes(), "gone")
    assert job.restarts == 0
    assert "not requeued; to resume: " in job.output
    assert (job.run / "checkpoints/latest").exists(), "saved in the time that Slurm gives"


@pytest.mark.slow
def test_time_limit(jobs):
    """Slurm asks before the limit; the job is requeued as often as it may be, then it fails."""
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
