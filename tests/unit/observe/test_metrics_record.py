"""The record of a step and reading it back."""

import json
import math
import tracemalloc

import pytest

from moepp_megatron.observe import metrics
from moepp_megatron.observe.jsonl import JsonlSink
from moepp_megatron.observe.metrics import MetricsError, read_metrics
from tests.unit.observe.conftest import lines_of, make_record

REQUIRED = [
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "step_time_s",
    "tokens_per_s",
    "balance_loss",
    "ffn_fraction",
    "ffn_per_token",
    "expert_share",
    "max_ffn_load",
    "dropped_fraction",
    "a2a_bytes",
]


def test_a_line_has_the_promised_keys_and_no_empty_ones():
    line = make_record(3).to_json_line()
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    assert sorted(json.loads(line)) == sorted(REQUIRED)


def test_optional_and_unknown_keys_survive_a_round_trip(path):
    record = make_record(valid_loss=5.5, layer_expert_share=[[0.5, 0.25, 0.25, 0.0]], own_key=7)
    path.write_text(record.to_json_line())
    assert list(read_metrics(path)) == [record]
    assert json.loads(path.read_text())["own_key"] == 7


def test_numbers_that_are_not_finite_stay_standard_json(path):
    path.write_text(make_record(loss=math.nan, grad_norm=math.inf).to_json_line())
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert values["loss"] is None
    (record,) = read_metrics(path)
    assert math.isnan(record.loss)
    assert math.isnan(record.grad_norm)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_record_without_a_required_key_is_refused_by_name(path, key):
    values = json.loads(lines_of(1))
    del values[key]
    path.write_text(json.dumps(values) + "\n")
    with pytest.raises(MetricsError, match=rf"metrics\.jsonl:1: {key}: Field required"):
        read_metrics(path)


@pytest.mark.parametrize("torn", [b'{"step": 3, "tok', b"\x00\x00\x00", b"\xff{"])
def test_a_torn_last_line_is_ignored(path, torn):
    path.write_bytes(lines_of(1, 2).encode() + torn)
    assert [r.step for r in read_metrics(path)] == [1, 2]


def test_steps_that_were_run_again_count_once(path):
    records = [make_record(s, loss=float(i)) for i, s in enumerate([1, 2, 3, 2, 3, 4])]
    path.write_text("".join(r.to_json_line() for r in records))
    assert [(r.step, r.loss) for r in read_metrics(path)] == [(1, 0), (2, 3), (3, 4), (4, 5)]


def test_missing_and_empty_files_are_named_with_a_remedy(path):
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: cannot be read .*moepp train"):
        read_metrics(path)
    path.write_text('{"step": 1')
    with pytest.raises(MetricsError, match=r"no complete record yet; wait"):
        read_metrics(path)


def test_records_take_hardly_any_memory(path):
    with path.open("w") as file:
        for step in range(1, 1001):
            file.write(make_record(step, layer_expert_share=[[1 / 64] * 64] * 4).to_json_line())
    tracemalloc.start()
    try:
        records = read_metrics(path)
        steps = [record.step for record in records]
        JsonlSink(path, resume_step=601).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert steps == list(range(1, 1001))
    assert [record.step for record in read_metrics(path)] == list(range(1, 601))
    assert peak < path.stat().st_size / 10


def test_a_damaged_line_is_named_before_the_rest_is_read(path):
    seen = []
    path.write_text(lines_of(1) + "{oops\n" + lines_of(2))
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: is not a JSON object"):
        read_metrics(path, lambda record: seen.append(record.step))
    assert seen == [1]


def test_a_line_beyond_any_record_is_not_read_whole(path, monkeypatch):
    monkeypatch.setattr(metrics, "LONGEST_LINE", 1 << 10)
    path.write_text(lines_of(1) + "x" * 5000 + "\n" + lines_of(2))
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:2: is not a JSON object"):
        read_metrics(path)
    JsonlSink(path).close()
    assert path.read_text() == lines_of(1, 2)


@pytest.mark.parametrize("key", ["step", "tokens", "a2a_bytes", "num_zeros"])
def test_a_count_beyond_64_bits_is_refused(path, key):
    path.write_text(json.dumps(json.loads(lines_of(1)) | {key: 10**400}) + "\n")
    with pytest.raises(MetricsError, match=rf"metrics\.jsonl:1: {key}: Input should be less"):
        read_metrics(path)


def test_a_file_that_changes_while_it_is_read(path):
    path.write_text(lines_of(1, 2, 3))
    records = read_metrics(path)
    path.write_text(lines_of(1, 7))
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: changed while it was read; try again"):
        list(records)
