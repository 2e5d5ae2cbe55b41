"""A run's folder: who is let in, who is refused, what is moved aside. No ranks."""

import errno
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import psutil
import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import RUN_FILES
from moepp_megatron.observe.status import RunStatus, StatusSink, _ProcessId
from moepp_megatron.training.run_folder import RunFolder, Start, ownership
from tests.refusals import config_error
from tests.unit.training.conftest import NEW, OVERWRITE, RESUME, by_start, config_of


@pytest.fixture
def run(tmp_path):
    return tmp_path / "runs/run"


def config_in(run, **sections):
    return config_of(run={"dir": str(run)}, **sections)


def folder_of(run, **sections):
    return RunFolder(config_in(run, **sections))


def enter(run, start=NEW, **sections):
    """Claim the folder and train there for no time; returns what was said."""
    said = []
    with folder_of(run, **sections).claim(start, said.append):
        StatusSink(run).close()
    return said


def look_beside_leader(run, start):
    folder_of(run).check_without_claim(start)


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_run(run, write=None):
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config_in(run).to_yaml())
    (run / "metrics.jsonl").write_text("records\n")
    if write is not None:
        write(run / "checkpoints", 5)


@pytest.mark.parametrize("trace", [*RUN_FILES, "checkpoints"])
@pytest.mark.parametrize("leads", [True, False], ids=["leader", "beside it"])
def test_each_trace_of_a_run_is_enough_to_be_refused(run, write, trace, leads):
    run.mkdir(parents=True)
    if trace == "checkpoints":
        write(run / "checkpoints", 5)
    else:
        (run / trace).write_text("")
    before = files(run)
    look = enter if leads else look_beside_leader
    message = (
        rf"^run\.dir \({run}\) must not hold a run, and has {trace}; .*--resume.*--overwrite.*$"
    )
    with config_error(message):
        look(run, Start(name="job"))
    assert files(run) == before


def test_folders_without_a_run_are_free(run):
    enter(run)
    other = run.with_name("other")
    (other / "slurm").mkdir(parents=True)
    (other / "slurm/7.out").write_text("waiting")
    (other / "checkpoints").mkdir()
    (other / "notes.txt").write_text("mine")
    enter(other)
    assert (other / "notes.txt").read_text() == "mine"


def test_both_ways_at_once_are_refused(run):
    with config_error("must not be given together"):
        enter(run, Start(resume=True, overwrite=True))
    assert not run.exists()


def test_a_run_that_ended_without_a_checkpoint_cannot_go_on(run):
    """Going on would train from step 0 over its records."""
    make_run(run)
    # Killed: what it has done is done anew, as a requeued job must.
    enter(run, RESUME)
    assert RunStatus.read(run).state == "ended"
    with config_error("must have a checkpoint for --resume"):
        enter(run, RESUME)


def test_overwrite_moves_what_runs_write_and_deletes_nothing(run, write):
    make_run(run, write)
    for name in ("report.html", "wandb_id", "metrics.jsonl.damaged-1", "profile/rank0.json"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("the run's")
    old = files(run)
    (run / "slurm").mkdir()
    (run / "slurm/7.out").write_text("this job's output")
    (run / "thesis.txt").write_text("mine")
    (run / "src").mkdir()
    (run / "src/config.yaml").write_text("mine")
    said = enter(run, OVERWRITE)
    # The name tells the date.
    (aside,) = run.parent.glob("run.2*")
    assert said == [f"moved the run of before to {aside}"]
    assert files(aside) == old
    assert sorted(files(run)) == ["slurm/7.out", "src/config.yaml", "status.json", "thesis.txt"]
    # Within the same second, too.
    for count in (2, 3):
        make_run(run)
        enter(run, OVERWRITE)
        assert len(list(run.parent.iterdir())) == 1 + count


@by_start
@pytest.mark.parametrize("held", [".git", "mine.yaml", "base.yaml"])
def test_a_folder_with_another_use_is_refused(run, write, held, start):
    run.mkdir(parents=True)
    (run / held).write_text("moe:")
    file = run / "mine.yaml" if held == "mine.yaml" else run.parent / "mine.yaml"
    file.write_text("base: run/base.yaml" if held == "base.yaml" else "moe:")
    start = replace(start, config_file=file)
    with config_error(rf"for only the run, and holds {held}; choose"):
        enter(run, start)
    make_run(run, write)
    before = files(run)
    # One that is there already is resumed.
    if start.resume:
        enter(run, start)
    else:
        with pytest.raises(ConfigError):
            enter(run, start)
        assert files(run) == before


def test_what_the_new_run_reads_stays(run, write):
    make_run(run, write)
    for name in ("data", "tokenizer.json"):
        (run / name).mkdir()
    data = {"path": str(run / "data"), "tokenizer": str(run / "tokenizer.json")}
    file = run / "config.yaml"
    content = file.read_bytes()
    enter(run, Start(overwrite=True, config_file=file), data=data)
    assert {path.name for path in run.iterdir()} == {
        "config.yaml",
        "data",
        "status.json",
        "tokenizer.json",
    }
    (aside,) = run.parent.glob("run.2*")
    assert file.read_bytes() == (aside / "config.yaml").read_bytes() == content


def test_a_run_that_is_the_base_keeps_its_configuration(run, write, tmp_path):
    make_run(run, write)
    content = (run / "config.yaml").read_bytes()
    (tmp_path / "mine.yaml").write_text(f"base: {run / 'config.yaml'}")
    enter(run, Start(overwrite=True, config_file=tmp_path / "mine.yaml"))
    (aside,) = run.parent.glob("run.2*")
    assert (run / "config.yaml").read_bytes() == (aside / "config.yaml").read_bytes() == content


def test_runs_below_the_run_stay(run, write):
    make_run(run, write)
    (run / "notes").mkdir()
    (run / "notes/mine.txt").write_text("mine")
    (run / "a.txt").symlink_to("notes/mine.txt")
    for name in ("child", "sweep/000", "child.20260101-000000"):
        make_run(run / name, write)
        RunStatus.own().write(run / name)
    # Checkpoints of the second one, which it is about to write.
    (run / "disk/of_sweep").mkdir(parents=True)
    (run / "disk/of_sweep/owner").write_text(f"{run / 'sweep' / '000'}\n")
    (run / "disk of a run that is gone").mkdir()
    (run / "disk of a run that is gone/owner").write_text("/gone\n")
    mine = {"notes", "a.txt", "disk of a run that is gone"}
    stay = ("child", "sweep", "child.20260101-000000", "disk")
    before = {name: files(run / name) for name in stay}
    everything = files(run)
    enter(run, OVERWRITE)
    assert {path.name for path in run.iterdir()} == {*stay, *mine, "status.json"}
    assert {name: files(run / name) for name in stay} == before
    (aside,) = run.parent.glob("run.2*")
    left = {name: text for name, text in files(run).items() if name != "status.json"}
    assert files(aside) | left == everything
    assert (aside / "checkpoints/step_00000005").is_dir()


@pytest.mark.parametrize("place", [".", "checkpoints", "sweep/checkpoints"])
def test_checkpoints_among_runs_that_stay_are_moved(run, write, place):
    """The new run would otherwise delete them."""
    make_run(run)
    write(run / place, 5)
    for name in ("checkpoints", "sweep"):
        make_run(run / name / "child")
        RunStatus.own().write(run / name / "child")
    everything = files(run)
    enter(run, OVERWRITE, checkpoint={"dir": str(run / place)})
    assert not (run / place / "step_00000005").exists()
    assert (run / "checkpoints/child/status.json").exists()
    assert (run / "sweep/child/status.json").exists()
    assert sorted(everything.values()) == sorted(
        text for name, text in files(run.parent).items() if name != "run/status.json"
    )


@pytest.mark.parametrize("setting", ["checkpoint.load", "distillation.teacher"])
def test_weights_that_would_be_moved_are_refused_as_a_start(run, write, setting):
    make_run(run, write)
    before = files(run)
    section, key = setting.split(".")
    for name in (str(run), "run", str(run / "checkpoints/step_00000005")):
        with config_error(rf"{section}\.{key} .* choose another run\.dir"):
            enter(run, OVERWRITE, **{section: {key: name}})
    assert files(run) == before


def test_checkpoints_elsewhere_are_traces_and_are_moved_beside(run, write):
    place = run.parent / "big disk/checkpoints"
    (write(place, 5) / "config.yaml").write_text(config_in(run).to_yaml())
    (place / "latest").write_text("step_00000005\n")
    (place / "mine.txt").write_text("kept")
    checkpoint = {"dir": str(place)}
    with config_error("has the checkpoints in .*big disk"):
        enter(run, checkpoint=checkpoint)
    enter(run, OVERWRITE, checkpoint=checkpoint)
    assert sorted(path.name for path in place.iterdir()) == ["mine.txt", "owner"]
    (aside,) = (path for path in place.parent.iterdir() if path != place)
    assert sorted(path.name for path in aside.iterdir()) == ["latest", "step_00000005"]


@by_start
def test_checkpoints_of_another_run_are_never_shared(run, write, start):
    other, place = run.with_name("other"), run.parent / "checkpoints"
    make_run(other)
    (write(place, 5) / "config.yaml").write_text(config_in(other).to_yaml())
    checkpoint = {"dir": str(place)}
    with config_error("must not hold"):
        enter(run, start, checkpoint=checkpoint)
    # A run that was renamed takes its checkpoints along.
    other.rename(run)
    enter(run, RESUME, checkpoint=checkpoint)


def test_nor_is_the_place_of_a_run_that_has_not_saved_yet(run):
    other = run.with_name("other")
    alive(other)
    with config_error(r"of another run, and has those of .*other; choose"):
        enter(run, checkpoint={"dir": str(other / "checkpoints")})


def alive(run, **changes):
    """A run of this process."""
    make_run(run)
    status = RunStatus.own().model_copy(update=changes)
    status.write(run)
    return status


@by_start
def test_two_runs_at_once_are_refused(run, start):
    alive(run)
    before = files(run)
    where = f"process {os.getpid()} on {socket.gethostname()} trains in it since 2"
    with config_error(None if start == NEW else where):
        enter(run, start)
    assert files(run) == before


@pytest.mark.parametrize("how", ["dead", "another process of that number", "zombie"])
def test_a_dead_process_holds_nothing(run, dead, how):
    if how == "dead":
        alive(run, pid=dead)
    elif how == "zombie":
        zombie = subprocess.Popen([sys.executable, "-c", ""])
        started = psutil.Process(zombie.pid).create_time()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        alive(run, pid=zombie.pid, started=started)
    else:
        alive(run, started=RunStatus.own().started - 60)
    enter(run, RESUME)
    if how == "zombie":
        zombie.wait()


@pytest.mark.parametrize("started", [-1e300, 1e18, 1e300])
def test_a_date_beyond_any_calendar_is_told_in_seconds(run, dead, started):
    alive(run, pid=dead, started=started, launcher=_ProcessId.own())
    with config_error(f"since {re.escape(f'{started:g}')} s after 1970; stop"):
        enter(run, RESUME)


def test_a_launcher_that_starts_ranks_anew_holds_the_folder(run, dead):
    alive(run, pid=dead, launcher=_ProcessId.own())
    with config_error(f"process {os.getpid()} on "):
        enter(run, RESUME)


@pytest.mark.parametrize("beats", [True, False])
def test_another_host_is_judged_by_its_beat(run, beats, monkeypatch):
    """No clock decides: the file of one that lives is touched until the answer is there."""
    alive(run, host="far-away")
    done = threading.Event()
    touching = threading.Thread(
        target=lambda: [os.utime(run / "status.json") for _ in iter(lambda: done.wait(0.05), True)]
    )
    if beats:
        touching.start()
        try:
            with config_error("on far-away trains in it"):
                enter(run, RESUME)
        finally:
            # Where the test fails too: Python waits for its threads.
            done.set()
            touching.join()
        return
    monkeypatch.setattr(ownership, "SILENT_S", 0.1)
    enter(run, RESUME)


def test_whoever_is_in_beats_and_lets_nobody_else_in(run, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT_S", 0.05)
    with folder_of(run).claim(NEW):
        os.utime(run / "status.json", ns=(0, 0))
        with config_error("must not"):
            enter(run, RESUME)
        while (run / "status.json").stat().st_mtime_ns == 0:
            pass


def test_restarts_of_the_same_run_are_let_in_at_once(run, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waited"))
    alive(run, host="the-lost-node")
    enter(run, Start(resume=True, restarted=True))


def test_a_requeued_job_is_known_by_its_number(run, monkeypatch):
    alive(run, job="17", start="17.0.0")
    folder = folder_of(run)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert not folder.is_requeued("17.0.1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert folder.is_requeued("17.0.1")
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert not folder.is_requeued("18.0.1"), "another job's run"
    # A rank that looks after the one that decides has claimed the folder finds the same.
    for restarted in (True, False):
        alive(run, job="18", start="18.0.1", restarted=restarted)
        assert folder.is_requeued("18.0.1") is restarted


def test_ranks_beside_the_leader_know_its_claim(run):
    start = Start(name="job 7")
    look_beside_leader(run, start)
    with folder_of(run).claim(start):
        make_run(run)
        look_beside_leader(run, start)
        with config_error("must not hold a run"):
            look_beside_leader(run, Start(name="job 8"))


def test_ranks_that_look_while_the_leader_claims_are_let_in(run, monkeypatch):
    look = RunFolder.traces

    def look_late(*arguments):
        run.mkdir(parents=True, exist_ok=True)
        RunStatus.own("job 7", restarted=False, resume_command=None).write(run)
        return look(*arguments)

    monkeypatch.setattr(RunFolder, "traces", look_late)
    look_beside_leader(run, Start(name="job 7"))
    with config_error(r"has status\.json"):
        look_beside_leader(run, Start(name="job 8"))


def test_a_start_from_which_no_run_came_leaves_nothing(run):
    with folder_of(run).claim(Start(resume_command="moepp train x --resume")):
        assert RunStatus.inherited().resume_command == "moepp train x --resume"
    assert not run.exists()
    assert RunStatus.inherited() is None
    # A run that was there keeps what it said.
    enter(run)
    ended = RunStatus.read(run)
    with folder_of(run).claim(RESUME):
        assert RunStatus.read(run).state == "running"
    assert RunStatus.read(run) == ended


def test_a_rank_keeps_what_its_launcher_said(run):
    with folder_of(run).claim(Start(name="job", resume_command="again"), print):
        os.environ["MOEPP_CLAIM"] = os.environ["MOEPP_CLAIM"].replace(
            f'"pid":{os.getpid()}', '"pid":1'
        )
        StatusSink(run)
        status = RunStatus.read(run)
        assert (status.pid, status.launcher.pid, status.start) == (os.getpid(), 1, "job")
        assert status.resume_command == "again"


def test_a_full_disk_is_freed_of_half_written_checkpoints(run, write, monkeypatch):
    make_run(run, write)
    leftover = run / "checkpoints/.step_00000009.incomplete-abc"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(b"half")

    write = RunStatus.write

    def full(status, run_dir):
        if leftover.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(status, run_dir)

    monkeypatch.setattr(RunStatus, "write", full)
    enter(run, RESUME)
    assert not leftover.exists()


def test_folders_that_cannot_be_used(tmp_path):
    """Each in one line with path and cause; the same for whoever is root."""
    (tmp_path / "file").write_text("")
    for name in ("metrics.jsonl", "config.yaml", "status.json", "alerts.jsonl"):
        (tmp_path / name / name).mkdir(parents=True)
    for name in ("tensorboard", "checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    cases = {
        "file": "File exists",
        "file/run": "Not a directory",
        "/proc/run": "No such file or directory",
        "/sys/kernel/run": "",
        "metrics.jsonl": "metrics.jsonl to be a file",
        "config.yaml": "config.yaml to be a file",
        "status.json": "status.json to be a file",
        "alerts.jsonl": "alerts.jsonl to be a file",
        "tensorboard": "tensorboard to be a folder",
        "checkpoints": "checkpoints to be a folder",
    }
    for name, cause in cases.items():
        run = tmp_path / name
        with config_error(rf"^.*\({run}\).*{cause}.*another run\.dir.*$"):
            enter(run, RESUME)
    with config_error(r"checkpoint\.dir .* must leave .*file to be a folder"):
        enter(tmp_path / "run", checkpoint={"dir": str(tmp_path / "file/c")})


def test_read_only_folder(run):
    """Bound read-only where that is allowed, since nothing else keeps root out."""
    run.mkdir(parents=True)
    bind = ["mount", "--bind", str(run), str(run)]
    if subprocess.run(bind, capture_output=True).returncode != 0:
        pytest.skip("mounts are not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(run)], check=True)
        with config_error("can be written .Read-only file system"):
            enter(run)
    finally:
        subprocess.run(["umount", str(run)], check=True)


def test_a_full_disk_asks_for_room(run, monkeypatch):
    def full(status, run_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RunStatus, "write", full)
    with config_error(r"No space left on device\); make room there, or choose"):
        enter(run)
    assert not run.exists()
