"""Files of a run that are removed, renamed or rotated while it writes them."""

import shutil
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from moepp_megatron.observe.alert_sinks import _AlertFile
from moepp_megatron.observe.alerts import read_alerts
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.status import RunStatus, StatusSink, _ProcessId
from tests.refusals import config_error
from tests.unit.observe.conftest import make_alert, steps_in, write_steps


def rotate(run):
    """As logrotate without `copytruncate`."""
    for path in run.glob("*.jsonl"):
        path.rename(path.with_name(f"{path.name}.1"))


def rotate_and_create(run):
    names = [path.name for path in run.glob("*.jsonl")]
    rotate(run)
    for name in names:
        (run / name).touch()


def remove(run):
    for path in run.glob("*.jsonl"):
        path.unlink()


def move_folder(run):
    run.rename(run.with_name("moved"))


LOSSES = [rotate, rotate_and_create, remove, move_folder, shutil.rmtree]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("lose", LOSSES)
def test_what_follows_is_under_the_name_again(run, caplog, lose):
    sink, alerts = JsonlSink(run / "metrics.jsonl"), _AlertFile(run / "alerts.jsonl")
    for step in (1, 2):
        write_steps(sink, step)
        alerts.send(make_alert(step))
    lose(run)
    for step in (3, 4):
        write_steps(sink, step)
        alerts.send(make_alert(step))
    sink.go_back(3)
    sink.close()
    alerts.close()
    assert steps_in(run / "metrics.jsonl") == [3]
    assert steps_in(run / "metrics.undone.jsonl") == [4]
    assert [each.step for each in read_alerts(run / "alerts.jsonl")] == [3, 4]
    gone = lose in (remove, shutil.rmtree)
    what = "removed, with all that was in it" if gone else "renamed"
    assert caplog.messages == [
        f"{run / name} was {what}, while the run writes it: a new file begins"
        for name in ("metrics.jsonl", "alerts.jsonl")
    ]


def test_records_that_are_removed_before_the_end_are_a_failure(run):
    sink = JsonlSink(run / "metrics.jsonl")
    write_steps(sink, 1)
    remove(run)
    with pytest.raises(OSError, match=r"metrics.jsonl was removed while the run wrote it"):
        sink.close()
    sink.close()


@contextmanager
def other_run(folder):
    """Another process that trains in the folder."""
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(sleeper.pid).create_time()
        process = {"pid": sleeper.pid, "started": started}
        RunStatus.own().model_copy(update=process).write(folder)
        yield
    finally:
        sleeper.kill()
        sleeper.communicate()


def test_a_run_that_took_the_name_keeps_it_for_itself(run):
    sink = JsonlSink(run / "metrics.jsonl")
    write_steps(sink, 1)
    move_folder(run)
    run.mkdir()
    with other_run(run):
        message = rf"run.dir \({run}\) must stay this run's while it trains, and process"
        with config_error(message):
            write_steps(sink, 2)
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize("state", ["ended", "running"])
def test_a_folder_from_a_backup_is_written_on(run, state):
    """Its status may be that of an earlier start of the run, which is gone."""
    sink = JsonlSink(run / "metrics.jsonl")
    shutil.rmtree(run)
    run.mkdir()
    gone = RunStatus.own().model_copy(update={"state": state, "started": 1.0})
    gone.write(run)
    write_steps(sink, 2)
    assert steps_in(run / "metrics.jsonl") == [2]


def test_the_status_is_there_again(run):
    sink = StatusSink(run)
    (run / "status.json").unlink()
    write_steps(sink, 1)
    status = RunStatus.model_validate_json((run / "status.json").read_bytes())
    assert (status.state, status.pid) == ("running", _ProcessId.own().pid)
