"""NCCL Inspector's logs: samples written from its source, and damaged ones."""

import json
from pathlib import Path

import pytest

from moepp_megatron.tools.profiling.collective import Collective, Operation
from moepp_megatron.tools.profiling.formats.inspector import read_inspector
from moepp_megatron.tools.profiling.trace import ProfileError

SAMPLES = Path(__file__).parent / "samples"
NEW = sorted((SAMPLES / "inspector_2_30").glob("*.log"))
OLD = sorted((SAMPLES / "inspector_2_28").glob("*.log"))

# What the samples were written from: rows[call][sender][receiver], hidden 1536 in bf16.
ROW = 1536 * 2
ROWS = [
    [[40, 8, 0, 16], [12, 30, 22, 4], [0, 50, 10, 4], [9, 9, 9, 37]],
    [[20, 20, 20, 4], [0, 64, 0, 0], [16, 16, 16, 16], [1, 2, 3, 58]],
]


def all_to_alls(collectives: list[Collective], rank: int) -> list[Collective]:
    return [
        one for one in collectives if one.operation is Operation.ALL_TO_ALL and one.rank == rank
    ]


def test_each_uneven_all_to_all_is_one_collective():
    found = read_inspector(NEW)
    for rank in range(4):
        calls = all_to_alls(found, rank)
        assert [call.sequence for call in calls] == [0, 1]
        for call, rows in zip(calls, ROWS, strict=True):
            assert call.sent == tuple(count * ROW for count in rows[rank])
            assert call.received == tuple(sender[rank] * ROW for sender in rows)
            assert call.size == max(sum(call.sent), sum(call.received))
            assert call.group_ranks == (0, 1, 2, 3)
            assert call.description == "EXPERT_MODEL_PARALLEL_GROUP"
    assert not [one for one in found if one.operation in (Operation.SEND, Operation.RECEIVE)]


def test_an_all_to_all_lasts_from_its_first_start_to_its_last_end():
    call = all_to_alls(read_inspector(NEW), 0)[0]
    # Written: the kernel began 3060 us after the anchor; the largest part takes 150 + 2 * 40 us.
    assert call.placed
    assert call.start_us == 1795600000000000 + 3060
    assert 230 <= call.duration_us <= 230 + 8  # parts start up to 8 us apart


@pytest.mark.parametrize("paths", [NEW, OLD])
def test_bandwidths_are_those_that_the_inspector_computed(paths):
    written = {}
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the live file's last line
            if numbers := record.get("coll_perf"):
                key = (record["header"]["rank"], numbers["coll"], numbers["coll_sn"])
                written[key] = (numbers["coll_algobw_gbs"], numbers["coll_busbw_gbs"])
    names = {"AllReduce": "all_reduce", "AllGather": "all_gather"}
    names |= {"ReduceScatter": "reduce_scatter", "Broadcast": "broadcast"}
    written = {(rank, names[name], sn): value for (rank, name, sn), value in written.items()}
    computed = {
        (one.rank, one.operation.value, one.sequence): (
            one.size / one.duration_us / 1e3,
            one.bus_bandwidth,
        )
        for one in read_inspector(paths)
        if one.operation is not Operation.ALL_TO_ALL
    }
    assert computed.keys() == written.keys()
    for key, values in written.items():
        # The plugin prints six digits after the point.
        assert computed[key] == pytest.approx(values, abs=1e-6), key


def test_nccl_2_28_without_times_names_or_peers():
    found = read_inspector(OLD)
    assert [one.rank for one in found].count(0) == 4
    assert not any(one.placed for one in found)
    assert found[0].duration_us == 61974
    assert found[0].description == ""


def test_the_unfinished_last_line_of_a_live_file_is_left_out():
    assert not OLD[1].read_text().endswith("\n")
    assert [one.rank for one in read_inspector(OLD)].count(1) == 3


def edited(tmp_path: Path, edit, number: int = 0, source: Path = NEW[0]) -> Path:
    """A log of which one line was changed."""
    lines = source.read_text().splitlines()
    record = json.loads(lines[number])
    edit(record)
    lines[number] = json.dumps(record)
    path = tmp_path / source.name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("edit", "missing"),
    [
        (lambda record: record["coll_perf"].pop("coll_msg_size_bytes"), "coll_msg_size_bytes"),
        (lambda record: record["coll_perf"].pop("coll"), "coll"),
        (lambda record: record["header"].pop("n_ranks"), "header.n_ranks"),
        (lambda record: record.pop("metadata"), "metadata.inspector_output_format_version"),
        (lambda record: record.pop("coll_perf"), "coll_perf"),
    ],
)
def test_a_missing_field_is_named_with_its_file(tmp_path, edit, missing):
    path = edited(tmp_path, edit, number=2)
    with pytest.raises(ProfileError) as caught:
        read_inspector([path])
    assert str(caught.value) == f"{path}, line 3: field {missing!r} is missing; record it again"


def test_an_unknown_format_version_is_refused(tmp_path):
    def edit(record):
        record["metadata"]["inspector_output_format_version"] = "v9.0"

    path = edited(tmp_path, edit)
    with pytest.raises(ProfileError, match=r"format v9\.0; supported: v4\.0"):
        read_inspector([path])


def test_unknown_fields_and_functions_are_kept_out_of_the_way(tmp_path):
    def edit(record):
        record["coll_perf"] |= {"coll": "AllReduceQuantum", "coll_colour": "blue"}

    found = read_inspector([edited(tmp_path, edit)])
    assert [one.operation for one in found].count(Operation.OTHER) == 1


def test_an_unknown_function_between_two_ranks_is_kept_as_other(tmp_path):
    path = tmp_path / NEW[0].name
    path.write_text(NEW[0].read_text().replace('"p2p":"Send"', '"p2p":"Put"', 1))
    found = read_inspector([path])
    assert [one.operation for one in found].count(Operation.OTHER) == 1


def test_a_damaged_line_that_is_not_the_last_is_an_error(tmp_path):
    path = tmp_path / "node-a-pid1.log"
    path.write_text(OLD[0].read_text().replace('{"header"', '{"header', 1))
    with pytest.raises(ProfileError, match="line 1: not JSON"):
        read_inspector([path])


def test_an_empty_log_has_no_collectives(tmp_path):
    path = tmp_path / "node-a-pid1.log"
    path.write_text("")
    assert read_inspector([path]) == []


def test_a_lost_peer_record_leaves_the_numbers_of_calls_open(tmp_path):
    lines = NEW[0].read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if '"p2p_sn":2,' in line)
    path = tmp_path / NEW[0].name
    path.write_text("\n".join(lines[:first] + lines[first + 1 :]) + "\n")
    assert [call.sequence for call in all_to_alls(read_inspector([path]), 0)] == [None, None]


def test_two_runs_together_are_refused(tmp_path):
    again = edited(tmp_path, lambda record: record["metadata"].update(pid=1))
    with pytest.raises(ProfileError, match="both have rank 0; give files of one run only"):
        read_inspector([NEW[0], again])
