"""A job that loses a node and is preempted; a job that continues with fewer nodes."""

import pytest

from tests.faults.harness import losses
from tests.slurm.conftest import NASTY
from tests.slurm.jobs import STEPS

pytestmark = pytest.mark.timeout(2400)
# A lost node's step never answers, for which Slurm waits this long.
KILL_WAIT_S = 5


# To only the batch script, as before a time limit, and to every process of the step at once, as
# the scheduler preempts. Slurm takes half a minute for each start after one.
SIGNALS = (("--batch", "--signal=USR1"), ("--signal=TERM",))


@pytest.mark.parametrize(
    "signals", [SIGNALS[:1], pytest.param(SIGNALS, marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_lost_node_and_preemptions_leave_the_loss_curve_unbroken(jobs, undisturbed, signals):
    job = jobs.submit(run={"name": NASTY})
    job.wait_for_step(6)
    nodes = {rank: each.environ()["SLURMD_NODENAME"] for rank, each in job.ranks().items()}
    assert nodes == {0: "n1", 1: "n2"}, "one rank a node, in the order of the nodes"
    assert jobs.cluster.run("squeue", "-h", "-j", job.number, "-o", "%j").strip() == NASTY
    jobs.cluster.kill_node("n2")
    job.wait_for_state("PENDING")
    jobs.cluster.wait_for_nodes("down", ("n2",))
    # Its node is back before anything else could have let it start.
    assert job.state == "PENDING"
    assert job.restarts == 1
    reached = job.step
    jobs.cluster.start_node("n2")
    for restarts, options in enumerate(signals, 2):
        job.wait_for_step(reached + 1)
        job.signal(*options)
        job.wait_for_restart(restarts)
        reached = job.step
        assert (job.run / "checkpoints/latest").read_text().strip() == f"step_{reached:08d}"
    job.wait_for_end("COMPLETED")
    assert losses(job.run) == undisturbed, "the same layout continues to the bit"
    assert sorted(undisturbed) == list(range(1, STEPS + 1))
    assert f"requeued ({1 + len(signals)} of at most 20 times)" in job.output
    assert not list(jobs.folder.rglob("pwned"))


@pytest.mark.slow
def test_job_continues_with_the_nodes_that_are_left(jobs):
    job = jobs.submit(slurm={"min_nodes": 1}, parallel={"expert_model_parallel_size": 1})
    job.wait_for_step(10)
    assert len(job.ranks()) == 2
    jobs.cluster.kill_node("n2")
    job.wait_for_end("COMPLETED")
    assert job.restarts == 1
    assert "start 2 on n1, 1 nodes" in job.output
    assert sorted(losses(job.run)) == list(range(1, STEPS + 1))
