"""A run watched from outside: what is read, what is kept, whether it is alive."""

import json
import time

import pytest

from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.status import RunStatus, StatusSink
from moepp_megatron.tools.report.live.run import LiveRun
from moepp_megatron.tools.report.run_data import ReportError
from tests.unit.tools.report.conftest import append, records_of

HOUR = 3600.0


def polled(run, after_s=0.0):
    live = LiveRun(run, clock=lambda: time.time() + after_s)
    live.poll()
    return live


def steps(live):
    return [record.step for record in live.history.recent]


def set_status(run, state="running", **changes):
    StatusSink(run)
    status = RunStatus.read(run)
    changed = status.model_copy(update={"state": state} | changes)
    (run / "status.json").write_text(changed.model_dump_json())


def test_records_are_read_as_they_come(make_run):
    run = make_run(steps=6)
    records = records_of(run)
    (run / "metrics.jsonl").write_text("")
    append(run, *records[:3])
    live = polled(run)
    assert steps(live) == [1, 2, 3]
    line = json.dumps(records[3])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[:50])
    live.poll()
    assert steps(live) == [1, 2, 3]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[50:] + "\nnot a record\n")
    append(run, records[4])
    live.poll()
    assert steps(live) == [1, 2, 3, 4, 5]
    assert [r.loss for r in live.history.recent] == [record["loss"] for record in records[:5]]
    assert live.damaged_lines == 1


def test_a_resumed_run_continues_from_its_checkpoint(make_run):
    run = make_run(steps=6)
    live = polled(run)
    records = records_of(run)
    sink = JsonlSink(run / "metrics.jsonl", resume_step=4)
    sink.write(StepMetrics(**(records[3] | {"loss": 1.0})))
    live.poll()
    assert steps(live) == [1, 2, 3, 4]
    assert live.history.newest.loss == 1.0
    # A rollback within a process takes steps again without rewriting the file.
    append(run, records[2] | {"loss": 2.0})
    live.poll()
    assert steps(live) == [1, 2, 3]
    assert live.history.newest.loss == 2.0
    sink.close()


def test_numbers_that_not_every_record_has(make_run):
    def edit(records):
        records[1]["valid_loss"] = 7.0
        del records[3]["valid_loss"]
        records[2]["loss"] = records[3]["loss"] = None

    history = polled(make_run(steps=4, edit=edit, each={"energy_j": 10.0})).history
    assert history.latest["energy_j"] == 10.0
    assert history.latest["valid_loss"] == 7.0
    assert history.record_interval_s == history.step_time_s


def test_states(make_run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert polled(empty).health().state == "waiting"
    run = make_run(steps=5)
    records = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").unlink()
    assert polled(run).health().state == "starting"
    (run / "metrics.jsonl").write_bytes(records)
    assert polled(run).health().state == "running"
    silent = polled(run, HOUR).health()
    assert silent.state == "silent"
    assert silent.text.startswith("no record for 1 h 00 min; one came every 0.")
    assert not silent.is_over
    # This process is alive, and yet there is no record.
    set_status(run)
    assert polled(run, HOUR).health().state == "silent"
    set_status(run, "ended")
    assert polled(run).health().state == "stopped"
    # Another process has got the same number since.
    set_status(run, started=time.time() - HOUR)
    assert polled(run, HOUR).health().state == "died"
    set_status(run, pid=2**22 + 1)
    died = polled(run, HOUR).health()
    assert died.state == "died"
    assert died.is_over
    # On another machine nothing is known of its processes.
    set_status(run, pid=2**22 + 1, host="elsewhere")
    assert polled(run, HOUR).health().state == "silent"


def test_long_intervals_between_records_are_no_silence(make_run):
    run = make_run(steps=5, each={"step_time_s": 600.0})
    assert polled(run, HOUR).health().state == "running"
    assert polled(run, 2 * HOUR).health().state == "silent"


def test_the_target_of_a_budget_stands_before_phi(make_run):
    run = make_run(steps=2)
    live = polled(run)
    assert live.target_ffn_share == pytest.approx(0.6)
    append(run, records_of(run)[-1] | {"step": 3, "ffn_target": 0.4})
    live.poll()
    assert live.target_ffn_share == 0.4


def test_wrong_folders_are_refused(tmp_path, make_run):
    with pytest.raises(ReportError, match="is not a folder; name the folder of a run"):
        LiveRun(tmp_path / "missing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("x")
    # A folder `slurm` of a job that waits, in what is no run's folder: a clone of the repository.
    (tmp_path / "other/slurm").mkdir()
    with pytest.raises(ReportError, match=r"holds other files but no config\.yaml"):
        LiveRun(tmp_path / "other")
    run = make_run(steps=1)
    (run / "config.yaml").write_text("moe: {}\n")
    with pytest.raises(ReportError, match=r"config\.yaml: run: Field required"):
        polled(run)
