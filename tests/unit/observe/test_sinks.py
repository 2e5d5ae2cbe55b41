"""The places that records go to, and the handling of their failures."""

import errno
import io
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from moepp_megatron.observe import sinks
from moepp_megatron.observe.console import ConsoleSink
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import read_metrics
from moepp_megatron.observe.sinks import Sinks, SinkSettings, _RetryingSink
from moepp_megatron.observe.tensorboard import TensorBoardSink
from moepp_megatron.runtime.terminal import Console
from tests.full_disk import fill
from tests.unit.observe.conftest import EXPERTS, lines_of, make_record, steps_in, write_steps


def test_every_record_is_one_whole_write(tmp_path, monkeypatch):
    writes = []
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or real_write(fd, data))
    sink = JsonlSink(tmp_path / "run/metrics.jsonl")
    for step in (1, 2):
        write_steps(sink, step)
        # Readable at once by another process, before close.
        assert steps_in(sink.path)[-1] == step
    sink.close()
    sink.close()
    assert writes == [lines_of(step).encode() for step in (1, 2)]


def test_a_short_write_leaves_whole_lines_and_says_so(path, monkeypatch):
    sink = JsonlSink(path)
    write_steps(sink, 1)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
    with pytest.raises(OSError, match=r"only 10 of \d+ bytes could be written; free disk space"):
        write_steps(sink, 2)
    monkeypatch.undo()
    write_steps(sink, 3)
    assert steps_in(sink.path) == [1, 3]
    sink.close()


def test_records_wait_for_a_full_disk(path, monkeypatch, caplog):
    sink = _RetryingSink(JsonlSink(path))
    write_steps(sink, 1)
    real_write = os.write

    def refuse(fd, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    write_steps(sink, 2, 3)
    assert caplog.messages[-1] == (
        "step 3: 2 records of metrics wait for the disk: [Errno 28] No space left on device"
    )
    monkeypatch.setattr(os, "write", real_write)
    write_steps(sink, 4)
    assert steps_in(path) == [1, 2, 3, 4]
    monkeypatch.setattr(os, "write", refuse)
    write_steps(sink, 5)
    with pytest.raises(OSError, match="No space left"):
        sink.close()


@pytest.mark.parametrize(
    ("resume_step", "expected"), [(None, [1, 2, 3, 4]), (3, [1, 2, 4]), (9, [1, 2, 3, 4]), (0, [4])]
)
def test_resuming_repairs_the_file(path, tmp_path, resume_step, expected):
    path.write_text(lines_of(1, 2, 3) + '{"step": 4, "lo')
    sink = JsonlSink(path, resume_step)
    write_steps(sink, 4)
    sink.close()
    assert steps_in(path) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", [b"garbage\n", b"\0" * 300 + b"\n", b'{"step": 1}\n', b"\xff\n"])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(path, tmp_path, caplog, damage):
    before = lines_of(1).encode() + damage + (lines_of(2, 3) + lines_of(4)[:20]).encode()
    for number in (1, 2):
        path.write_bytes(before)
        JsonlSink(path, resume_step=3).close()
        assert steps_in(path) == [1, 2]
        aside = tmp_path / f"metrics.jsonl.damaged-{number}"
        assert aside.read_bytes() == before
        assert "metrics.jsonl:2: " in caplog.messages[-1]
        assert f"3 records are kept, and the file as it was is now {aside}" in caplog.messages[-1]
    assert len(caplog.messages) == 2


def test_what_a_rollback_undoes_leaves_the_file(path, tmp_path):
    sink = JsonlSink(path)
    for step in (1, 2, 3, 4):
        write_steps(sink, step, loss=step)
    sink.go_back(4)
    assert not (tmp_path / "metrics.undone.jsonl").exists()
    sink.go_back(2)
    # At once, not only when later records displace them.
    assert steps_in(sink.path) == [1, 2]
    assert steps_in(tmp_path / "metrics.undone.jsonl") == [3, 4]
    write_steps(sink, 3, loss=7.0)
    sink.go_back(2)
    sink.go_back(0)
    write_steps(sink, 1)
    sink.close()
    assert steps_in(sink.path) == [1]
    undone = (tmp_path / "metrics.undone.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in undone] == [3.0, 4.0, 7.0, 1.0, 2.0]


def test_a_rollback_waits_for_a_full_disk_as_records_do(path, tmp_path, monkeypatch, caplog):
    sink = _RetryingSink(JsonlSink(path))
    write_steps(sink, 1, 2, 3)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:10]))
    sink.go_back(1)
    write_steps(sink, 2, loss=7.0)
    assert "2 records of metrics wait for the disk" in caplog.messages[-1]
    assert steps_in(path) == [1, 2, 3]
    monkeypatch.undo()
    sink.close()
    assert [r.loss for r in read_metrics(path)] == [5.25, 7.0]
    assert steps_in(tmp_path / "metrics.undone.jsonl") == [2, 3]


class FailingSink:
    """Fails at every record."""

    def __init__(self):
        self.calls = 0

    def write(self, record):
        self.calls += 1
        raise RuntimeError("no display")

    def close(self):
        raise RuntimeError("cannot close")


class ListSink:
    """Keeps the steps it is given."""

    def __init__(self):
        self.steps = []
        self.closed = False

    def write(self, record):
        self.steps.append(record.step)

    def close(self):
        self.closed = True


def test_a_failing_optional_sink_is_left_out_with_one_warning(caplog):
    required, failing, other = ListSink(), FailingSink(), ListSink()
    fan = Sinks([required], [failing, other])
    with caplog.at_level(logging.WARNING):
        write_steps(fan, 1, 2, 3)
        fan.close()
    assert required.steps == other.steps == [1, 2, 3]
    assert required.closed
    assert other.closed
    assert failing.calls == 1
    assert caplog.messages == ["FailingSink failed at step 1 and is off from here on: no display"]


def test_a_failing_required_sink_stops_the_run_and_the_others_are_closed():
    other = ListSink()
    fan = Sinks([FailingSink()], [other])
    with pytest.raises(RuntimeError, match="no display"):
        write_steps(fan, 1)
    with pytest.raises(RuntimeError, match="cannot close"):
        fan.close()
    assert other.closed


def test_every_record_gets_a_plain_line_in_a_log():
    """Only `training.log_interval` decides which steps have a record."""
    out = io.StringIO()
    sink = ConsoleSink(100, phi=0.6, console=Console(file=out, width=40))
    for step in (5, 10, 13, 15, 20):
        sink.write(make_record(step, valid_loss=5.5 if step == 13 else None))
    sink.close()
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        f"step {step}/100" for step in (5, 10, 13, 15, 20)
    ]
    assert lines[1] == (
        "step 10/100 | loss 5.2500 | lr 3.00e-04 | grad norm 1.500 | FFN share 0.625 (phi 0.600) "
        "| 1,024 tokens/s | ETA 0:00:45"
    )
    assert "| valid loss 5.5000 |" in lines[2]


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    sink = ConsoleSink(2, phi=0.6, console=console)
    write_steps(sink, 1, valid_loss=5.5)
    write_steps(sink, 2)
    sink.close()
    shown = out.getvalue()
    assert "step 1: validation loss 5.5000" in shown
    assert "FFN share 0.625 (phi 0.600)" in shown
    assert "2/2" in shown


# What a training prints, in its order; then what has become of it.
_PRINTS = """
import sys
from moepp_megatron.cli.echo import echo
from moepp_megatron.observe.console import ConsoleSink
from moepp_megatron.runtime.terminal import lasting_output
with lasting_output():
    sink = ConsoleSink(2, phi=0.6)
    if {by_sink_first}:
        sink.message("step 1")
    echo("loss")
    sink.message("step 2")
    sink.close()
    echo("report")
    print("ended", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("loss", "by_sink_first"),
    [("reader", True), ("reader", False), ("disk", False), ("terminal", False)],
)
def test_a_training_ends_well_though_nothing_can_be_printed(loss, by_sink_first):
    if loss == "disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe() if loss == "reader" else os.openpty()
        os.close(reader)
    words = [sys.executable, "-c", _PRINTS.format(by_sink_first=by_sink_first)]
    done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, text=True)
    os.close(stdout)
    assert (done.returncode, done.stderr) == (0, "ended\n")


def written(folder):
    """Return all that TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), {"histograms": 0}).Reload()


def scalars(folder, tag):
    return [(event.step, event.value) for event in written(folder).Scalars(tag)]


def test_tensorboard_gets_every_number(tmp_path):
    sink = TensorBoardSink(tmp_path, EXPERTS)
    sink.write(make_record(1, valid_loss=5.5, layer_ffn_fraction=[0.5, 0.75], own_key=2.0))
    by_source = {"web text": 4.0}
    experts = {"web text": [0.25, 0.25, 0.25, 0.25]}
    sink.write(make_record(2, loss=5.0, source_loss=by_source, source_expert_share=experts))
    sink.close()
    values = partial(scalars, tmp_path)
    assert values("loss/train") == [(1, 5.25), (2, 5.0)]
    assert values("loss/validation") == [(1, 5.5)]
    assert values("other/own_key") == [(1, 2.0)]
    assert values("source_loss/web_text") == [(2, 4.0)]
    assert values("source_expert_share/web_text/zero_0") == [(2, 0.25)]
    assert values("layer_ffn_fraction/moe_layer_2") == [(1, 0.75)]
    shares = [values(f"expert_share/{n}")[0][1] for n in ("FFN_0", "FFN_1", "constant_0", "zero_0")]
    assert shares == [0.3125, 0.3125, 0.25, 0.125]


def test_tensorboard_hides_what_a_rollback_undoes(tmp_path):
    sink = TensorBoardSink(tmp_path, EXPERTS)
    write_steps(sink, 1, 2, 3)
    sink.go_back(1)
    write_steps(sink, 2, loss=7.0)
    sink.close()
    assert scalars(tmp_path, "loss/train") == [(1, 5.25), (2, 7.0)]


def test_tensorboard_continues_with_room(small_disk, caplog, capsys):
    # Every record is longer than the buffer of the file, so that it is written at once.
    long = {f"key_{number}": number for number in range(500)}
    sink = TensorBoardSink(small_disk / "tensorboard", EXPERTS)
    write_steps(sink, 1, **long)
    sink._writer.flush()
    ballast = fill(small_disk)
    write_steps(sink, *range(2, 30), **long)
    assert "TensorBoard misses records: [Errno 28] No space left on device" in caplog.text
    ballast.unlink()
    write_steps(sink, 30, 31, **long)
    sink.close()
    (first, _), *_, (last, _) = scalars(small_disk / "tensorboard", "loss/train")
    assert (first, last) == (1, 31)
    assert "Traceback" not in capsys.readouterr().err


def test_tensorboard_survives_a_clock_that_is_set_back(tmp_path, monkeypatch):
    from tensorboard.summary.writer import event_file_writer

    ahead = [1e11]
    clock = SimpleNamespace(time=lambda: time.time() + ahead[0])
    monkeypatch.setattr(event_file_writer, "time", clock)
    sink = TensorBoardSink(tmp_path / "tensorboard", EXPERTS)
    write_steps(sink, 1)
    sink._writer.flush()
    ahead[0] = 0.0
    write_steps(sink, 2)
    for thread in threading.enumerate():
        if isinstance(thread, event_file_writer._AsyncWriterThread):
            thread.join(10)
    write_steps(sink, 3, 4)
    sink.close()
    (first, _), *_, (last, _) = scalars(tmp_path / "tensorboard", "loss/train")
    assert (first, last) == (1, 4)


def test_tensorboard_gets_histograms_of_lists(tmp_path):
    sink = TensorBoardSink(tmp_path, EXPERTS)
    for step in range(1, 12):
        tokens = [[0.25, 0.5, 0.25], [math.nan, 0.5, 0.5]]
        sink.write(make_record(step, layer_ffn_histogram=tokens, unnamed_list=[1.0, 2.0]))
    sink.close()
    events = written(tmp_path)
    # A layer whose weights are no numbers and a list that no table names give none.
    assert sorted(events.Tags()["histograms"]) == [
        "expert_share/all_layers",
        "ffn_experts_per_token/moe_layer_1",
    ]
    first, second = events.Histograms("ffn_experts_per_token/moe_layer_1")
    assert (first.step, second.step) == (1, 11)
    value = first.histogram_value
    # Tokens that take 0, 1 and 2 FFN experts; one on average.
    assert list(value.bucket) == [0.25, 0.5, 0.25]
    assert list(value.bucket_limit) == [0.5, 1.5, 2.5]
    assert (value.num, value.sum, value.min, value.max) == (1.0, 1.0, -0.5, 2.5)
    shares = events.Histograms("expert_share/all_layers")[0].histogram_value
    assert list(shares.bucket) == [0.3125, 0.3125, 0.25, 0.125]


def test_tensorboard_numbers_layers_as_alerts_and_pages_do(tmp_path):
    """By their place in the model, from 1: of layers 1 to 4 the second and the fourth are MoE."""
    fan = Sinks.open(SinkSettings(tmp_path, EXPERTS, phi=0.5, total_steps=1, moe_layers=[2, 4]))
    health = {"gate_entropy": [1.0, 2.0]}
    tokens = [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]
    fan.write(
        make_record(
            layer_ffn_fraction=[0.5, 0.75], router_health=health, layer_ffn_histogram=tokens
        )
    )
    fan.close()
    events = written(tmp_path / "tensorboard")
    tags = events.Tags()
    named = {tag for tag in tags["scalars"] + tags["histograms"] if "moe_layer" in tag}
    assert named == {
        f"{group}/moe_layer_{number}"
        for group in ("layer_ffn_fraction", "router_health/gate_entropy", "ffn_experts_per_token")
        for number in (2, 4)
    }
    assert [e.value for e in events.Scalars("layer_ffn_fraction/moe_layer_4")] == [0.75]


def test_open_sinks_trains_on_without_tensorboard(path, tmp_path, monkeypatch, caplog, capsys):
    def missing(*_):
        raise ImportError("TensorBoard output needs the tensorboard package")

    monkeypatch.setattr(sinks, "TensorBoardSink", missing)
    fan = Sinks.open(SinkSettings(tmp_path, EXPERTS, phi=0.5, total_steps=1))
    write_steps(fan, 1)
    fan.close()
    assert [r.step for r in read_metrics(path)] == [1]
    assert "no TensorBoard output: TensorBoard output needs" in caplog.text
    assert "FFN share 0.625 (phi 0.500)" in capsys.readouterr().out
