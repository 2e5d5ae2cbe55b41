"""One cluster for all tests of a file, one corpus for all of a worker."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.commands import moepp
from tests.faults.harness import losses, prepare_data
from tests.slurm.cluster import Cluster, missing_programs
from tests.slurm.jobs import STEPS, Jobs

# Shell, YAML and sbatch all have something to say about these characters.
NASTY = 'it\'s "a" $(touch pwned) `touch pwned`; # & * %j \u00e9'


def pytest_collection_modifyitems(items):
    missing = missing_programs()
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("slurm")
            if missing:
                reason = f"no {', '.join(missing)} here; apt-get install slurm-wlm"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def cluster(request):
    # Not pytest's folder: the path of a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="moepp-slurm-"))
    cluster = Cluster(folder, getattr(request.module, "KILL_WAIT_S", 30))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def jobs(request, cluster, data, tmp_path):
    """Submits jobs from a folder whose name no shell may read; none is left afterwards."""
    folder = tmp_path / NASTY
    folder.mkdir()
    cluster.wait_for_nodes("idle")
    jobs = Jobs(cluster, data, folder, getattr(request.module, "STEP_WAIT_S", 60))
    try:
        yield jobs
    finally:
        jobs.cancel_all()
        cluster.heal()


@pytest.fixture(scope="module")
def undisturbed(cluster, data, tmp_path_factory):
    """Losses by step of the expert-parallel run that nobody disturbs: two ranks, without Slurm."""
    jobs = Jobs(cluster, data, tmp_path_factory.mktemp("undisturbed"))
    config = jobs.config({})
    never = ("checkpoint.save_interval=0", "checkpoint.async_save=false")
    done = moepp("train", config, *never, "--nproc", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    reached = losses(jobs.folder / "run")
    assert sorted(reached) == list(range(1, STEPS + 1))
    return reached
