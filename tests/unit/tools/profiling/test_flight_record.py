"""Dumps of torch's flight recorder: recorded with gloo, written from its source for NCCL."""

import gzip
import json
import pickle
from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.collective import Operation
from moepp_megatron.tools.profiling.formats.flight_recorder import (
    _read_flight_record,
    read_flight_records,
)
from moepp_megatron.tools.profiling.trace import ProfileError

GLOO = Path(__file__).parent / "samples" / "flight_recorder_gloo"
NCCL = Path(__file__).parent / "samples" / "flight_recorder_nccl"


@pytest.mark.parametrize("rank", [0, 1])
def test_recorded_json_and_pickle_say_the_same(rank):
    as_json = _read_flight_record(GLOO / f"collectives_rank_{rank}.json")
    assert as_json == _read_flight_record(GLOO / f"trace_rank_{rank}")
    # What the recorded program did, three times over: see samples/README.md.
    once = ["all_reduce", "all_to_all", "barrier", "all_gather", "all_gather", "all_reduce"]
    # gloo's reduce-scatter is an all-reduce; its sends and receives are not recorded.
    assert [one.operation.value for one in as_json] == once * 3
    assert {one.rank for one in as_json} == {rank}


def test_recorded_sizes_groups_and_order():
    found = _read_flight_record(GLOO / "collectives_rank_1.json")
    exchange = found[1]
    # 40 rows of 4 floats sent, 50 received.
    assert exchange.size == 50 * 4 * 4
    assert exchange.description == "EXPERT_MODEL_PARALLEL_GROUP"
    assert [one.sequence for one in found if one.group == exchange.group] == [1, 2, 3]
    assert found[0].group_ranks == (0, 1)
    assert found[2].size is None
    times = [one.start_us for one in found]
    assert times == sorted(times)


def test_nccl_with_timing():
    found = {one.operation: one for one in _read_flight_record(NCCL / "collectives_rank_2.json")}
    exchange = found[Operation.ALL_TO_ALL]
    assert exchange.size == 58 * 1536 * 2  # sends 58 rows, receives 42
    assert exchange.group_ranks == (0, 1, 2, 3)
    assert exchange.duration_us == pytest.approx(250)
    assert exchange.sent is None  # the recorder keeps no splits
    assert found[Operation.ALL_GATHER].size == 16384 * 2
    assert found[Operation.REDUCE_SCATTER].size == 16384 * 4
    assert found[Operation.OTHER].size is None


def test_sends_and_receives_name_their_peer():
    sends = {one.operation: one for one in _read_flight_record(NCCL / "collectives_rank_0.json")}
    receives = {one.operation: one for one in _read_flight_record(NCCL / "collectives_rank_2.json")}
    ends = sends[Operation.SEND], receives[Operation.RECEIVE]
    assert [(one.pair, one.size) for one in ends] == [((0, 1), 2048 * 1536 * 2)] * 2


def test_a_collective_that_has_not_ended_takes_no_time():
    last = _read_flight_record(NCCL / "collectives_rank_0.json")[-1]
    assert (last.duration_us, last.bus_bandwidth) == (0, None)


def edited(tmp_path: Path, edit) -> Path:
    dump = json.loads((NCCL / "collectives_rank_0.json").read_text())
    edit(dump)
    path = tmp_path / "collectives_rank_0.json"
    path.write_text(json.dumps(dump))
    return path


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda dump: dump["entries"][1].pop("profiling_name"),
            ", entry 1: field 'profiling_name'",
        ),
        (lambda dump: dump["entries"][2].pop("input_sizes"), ", entry 2: field 'input_sizes'"),
        (lambda dump: dump["entries"][0].pop("process_group"), ", entry 0: field 'process_group'"),
        (lambda dump: dump.pop("entries"), ": field 'entries' is missing"),
        (lambda dump: dump.pop("pg_config"), ": field 'pg_config' is missing"),
        (lambda dump: dump.update(version="3.1"), ": flight record of version 3.1; supported: 2.x"),
    ],
)
def test_what_is_missing_is_named_with_its_file(tmp_path, edit, said):
    path = edited(tmp_path, edit)
    with pytest.raises(ProfileError) as caught:
        _read_flight_record(path)
    assert str(caught.value).startswith(f"{path}{said}")


def test_unknown_collectives_types_and_fields(tmp_path):
    def edit(dump):
        dump["entries"][0] |= {"profiling_name": "nccl:all_to_some", "colour": "blue"}
        dump["entries"][1] |= {"input_dtypes": ["Float2"], "output_dtypes": ["Float2"]}

    found = _read_flight_record(edited(tmp_path, edit))
    assert found[0].operation is Operation.OTHER
    assert found[1].size is None


class Planted:
    def __reduce__(self):
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "trace_rank_0"
    path.write_bytes(pickle.dumps({"version": "2.10", "entries": [Planted()]}))
    with pytest.raises(ProfileError, match=r"asks for builtins\.print, which no flight record"):
        _read_flight_record(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\x80\x02}q"])
def test_damaged_dumps(tmp_path, content):
    path = tmp_path / "trace_rank_0"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="trace_rank_0: "):
        _read_flight_record(path)


def test_the_rank_must_be_in_the_name(tmp_path):
    path = tmp_path / "dump.json"
    path.write_text("{}")
    with pytest.raises(ProfileError, match="must end with its rank, such as trace_rank_3"):
        _read_flight_record(path)


@pytest.mark.parametrize(("folder", "ranks"), [(GLOO, 2), (NCCL, 4)])
def test_a_folder_of_dumps_is_read_rank_by_rank(folder, ranks):
    by_rank = read_flight_records(folder)
    assert list(by_rank) == list(range(ranks))
    assert all(by_rank.values())


def test_a_rank_that_left_json_and_a_pickle_is_read_once():
    assert len(read_flight_records(GLOO)[0]) == 18


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"SQLite format 3\x00...", "an SQLite database such as Nsight Systems exports"),
        (b"PK\x03\x04", "a zip archive; unpack it"),
        (b"step,loss\n", "an unknown format, beginning with b'step,loss"),
        (b'{"step": 1, "loss": 2.0}', "an unknown format, beginning with b'{"),
        (b'[{"name": "x", "cat": "kernel", "ph": "X"}]', "an unknown format"),
        (b"\x80\x04K\x01.", "an unknown format"),
        (b"", "empty"),
    ],
)
def test_anything_else_is_named_with_what_is_supported(tmp_path, content, looks):
    path = tmp_path / "profile.bin"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        read_flight_records(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert looks in said
    assert said.endswith("torch flight-recorder dumps")


def test_folders_without_a_profile(tmp_path):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ProfileError, match=r"holds a\.txt, b\.txt, c\.txt and 1 more\); supported"):
        read_flight_records(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="holds nothing"):
        read_flight_records(tmp_path / "empty")
    with pytest.raises(ProfileError, match="no such file or folder"):
        read_flight_records(tmp_path / "absent")


def test_a_packed_file_that_was_cut_is_an_error(tmp_path):
    path = tmp_path / "collectives_rank_0.json.gz"
    whole = gzip.compress((NCCL / "collectives_rank_0.json").read_bytes())
    path.write_bytes(whole[:-40])
    with pytest.raises(ProfileError, match="cut short inside its gzip data"):
        read_flight_records(path)
