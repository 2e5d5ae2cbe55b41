"""Checkpoint folders outside of their run's folder: who may write there. No ranks."""

import errno
import fcntl
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.observe.status import StatusSink
from moepp_megatron.runtime.atomic import create_atomic
from moepp_megatron.training.checkpoint.find import find_checkpoint, list_checkpoints
from moepp_megatron.training.checkpoint.retention import Pruner
from moepp_megatron.training.run_folder import RunFolder, Start, ownership
from tests.refusals import config_error
from tests.unit.training.conftest import NEW, OVERWRITE, RESUME, by_start, config_of

REFUSED = r"checkpoint\.dir \(.+\) must not hold checkpoints of another run, and has those of .*{};"


@pytest.fixture
def place(tmp_path):
    """A checkpoint folder, and its parent, that are not there yet."""
    return tmp_path / "disk/shared"


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def of(runs, place):
    """Gives the configuration of the run of a name, with checkpoints in `place`."""

    def config(name, checkpoints=place):
        checkpoint = {"dir": None if checkpoints is None else str(checkpoints)}
        return config_of(run={"dir": str(runs / name)}, checkpoint=checkpoint)

    return config


def enter(config, start=NEW):
    """A run that writes its configuration and ends."""
    with RunFolder(config).claim(start, lambda line: None):
        folder = Path(config.run.dir)
        StatusSink(folder).close()
        (folder / "config.yaml").write_text(config.to_yaml())


def mark_of(place):
    return (place / "owner").read_text()


@by_start
def test_a_run_that_has_not_saved_yet_owns_its_folder(of, place, runs, start):
    with RunFolder(of("a")).claim(NEW):
        StatusSink(runs / "a")
        assert mark_of(place) == f"{runs}/a\n"
        with config_error(f"^{REFUSED.format('runs/a')}.*$"):
            enter(of("b"), start)
    assert [path.name for path in runs.iterdir()] == ["a"]
    assert [path.name for path in place.iterdir()] == ["owner"]


def start_at_once(config, barrier, answers):
    barrier.wait()
    try:
        with RunFolder(config).claim(NEW):
            StatusSink(Path(config.run.dir))
            answers.put(config.run.dir.name)
    except ConfigError as error:
        answers.put(str(error))


@pytest.mark.parametrize("is_stale", [False, True], ids=["new", "of a run that is gone"])
def test_of_two_at_once_one_is_let_in(of, place, tmp_path, runs, is_stale):
    if is_stale:
        place.mkdir(parents=True)
        (place / "owner").write_text(f"{tmp_path / 'gone'}\n")
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(2), fork.Queue()
    both = [fork.Process(target=start_at_once, args=(of(n), barrier, answers)) for n in "ab"]
    for process in both:
        process.start()
    winner, refusal = sorted((answers.get(), answers.get()), key=len)
    for process in both:
        process.join()
    assert f"and has those of {runs / winner};" in refusal
    assert mark_of(place) == f"{runs / winner}\n"


def test_without_locks_too(of, place, runs, monkeypatch):
    """The other one is let in between the look and the mark."""
    look, others = ownership.OwnerMark.refuse_other, ["a"]

    def look_early(mark):
        look(mark)
        if others:
            enter(of(others.pop()))

    def no_locks(*arguments):
        raise OSError

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(ownership.OwnerMark, "refuse_other", look_early)
    with config_error(REFUSED.format("runs/a")):
        enter(of("b"))
    assert mark_of(place) == f"{runs}/a\n"
    assert [path.name for path in runs.iterdir()] == ["a"]


def test_the_own_run_is_let_in_again(of, place, runs, write):
    enter(of("a"))
    # Before its first checkpoint, as the restart of a job, and after it.
    enter(of("a"), Start(resume=True, restarted=True))
    shutil.copy(runs / "a/config.yaml", write(place, 5) / "config.yaml")
    enter(of("a"), RESUME)
    (runs / "a").rename(runs / "b")
    enter(of("b"), RESUME)
    assert mark_of(place) == f"{runs}/b\n"
    # Another run gets the old name, by which the checkpoint still calls its run.
    enter(of("a", None))
    enter(of("b"), RESUME)


def test_a_run_that_is_moved_aside_takes_its_checkpoints_along(of, place, runs, write):
    enter(of("a"))
    shutil.copy(runs / "a/config.yaml", write(place, 5) / "config.yaml")
    enter(of("a"), OVERWRITE)
    assert mark_of(place) == f"{runs}/a\n"
    (aside,) = runs.glob("a.2*")
    (saved,) = place.parent.glob("shared.2*")
    enter(of(aside.name, saved), RESUME)
    with config_error(REFUSED.format(aside.name)):
        enter(of("a", saved), RESUME)
    # One without checkpoints leaves no folder for them.
    enter(of("a"), OVERWRITE)
    assert list(place.parent.glob("shared.2*")) == [saved]


@pytest.mark.parametrize("mark", ["", "\0\0\0", "/\0", "runs/a\n", "/gone\n", "\udcff"])
def test_marks_of_runs_that_are_not_there_count_for_nothing(of, place, runs, mark):
    place.mkdir(parents=True)
    (place / "owner").write_bytes(os.fsencode(mark))
    enter(of("a"))
    assert mark_of(place) == f"{runs}/a\n"


def test_a_start_from_which_no_run_came_leaves_nothing(of, place, tmp_path, runs):
    with RunFolder(of("a")).claim(NEW):
        assert (place / "owner").exists()
    assert list(tmp_path.iterdir()) == []
    # What was there stays: a file of somebody else, the mark of a running training.
    place.mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    with RunFolder(of("a")).claim(NEW):
        pass
    assert [path.name for path in place.iterdir()] == ["notes.txt"]
    enter(of("a"))
    with RunFolder(of("a")).claim(Start(restarted=True)):
        pass
    assert mark_of(place) == f"{runs}/a\n"


def test_a_full_disk_of_checkpoints_is_no_claim(of, place, runs, write, monkeypatch):
    """It is first freed of half-written checkpoints."""
    leftover = place / ".step_00000009.incomplete-abc"
    leftover.mkdir(parents=True)
    always = []

    def full(path, content):
        if always or leftover.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        create_atomic(path, content)

    monkeypatch.setattr(ownership, "create_atomic", full)
    with RunFolder(of("a")).claim(NEW):
        assert (place / "owner").exists()
    always.append(True)
    with config_error(r"No space left on device at .*owner\); make room there"):
        enter(of("a"))
    assert not runs.exists()
    assert list(place.iterdir()) == []


def test_links_are_followed(of, place, runs):
    """Checkpoints of a run whose folder of them is a link are elsewhere, too."""
    place.mkdir(parents=True)
    for name in "ab":
        (runs / name).mkdir(parents=True)
        (runs / name / "checkpoints").symlink_to(place)
    enter(of("a", None))
    with config_error(REFUSED.format("runs/a")):
        enter(of("b", None))
    enter(of("a"), Start(restarted=True))


def test_the_mark_is_no_checkpoint(of, place, write):
    enter(of("a"))
    old, new = write(place, 5), write(place, 6)
    assert list_checkpoints(place) == [new, old]
    assert find_checkpoint(place) == new
    Pruner(place, 1).wrote(new)
    assert sorted(path.name for path in place.iterdir()) == ["owner", new.name]
