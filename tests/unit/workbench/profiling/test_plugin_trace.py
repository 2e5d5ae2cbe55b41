"""Traces of NCCL's example profiler plugin: samples written from its source, and damaged ones."""

from pathlib import Path

import pytest

from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.formats.plugin_trace import read_plugin_trace
from moepp_megatron.workbench.profiling.formats.records import SourceError

SAMPLES = Path(__file__).parent / "samples"
VERSIONS = ["plugin_2_27", "plugin_2_28", "plugin_2_30"]
WORLD = "1493613951195738943"
EXPERTS = "9912422339845620111"

# What the samples were written from: rows[call][sender][receiver], hidden 1536 in bf16.
ROW = 1536 * 2
ROWS = [
    [[40, 8, 0, 16], [12, 30, 22, 4], [0, 50, 10, 4], [9, 9, 9, 37]],
    [[20, 20, 20, 4], [0, 64, 0, 0], [16, 16, 16, 16], [1, 2, 3, 58]],
]


def read(version: str) -> list[Collective]:
    return read_plugin_trace(sorted((SAMPLES / version).glob("*.json")))


def chosen(found: list[Collective], operation: Operation, rank: int = 0) -> list[Collective]:
    return [one for one in found if one.operation is operation and one.rank == rank]


@pytest.mark.parametrize("version", ["plugin_2_27", "plugin_2_30"])
def test_each_uneven_all_to_all_is_one_collective(version):
    found = read(version)
    for rank in range(4):
        calls = chosen(found, Operation.ALL_TO_ALL, rank)
        assert len(calls) == 2
        for call, rows in zip(calls, ROWS, strict=True):
            assert call.sent == tuple(count * ROW for count in rows[rank])
            assert call.received == tuple(sender[rank] * ROW for sender in rows)
            assert call.size == max(sum(call.sent), sum(call.received))
            assert (call.group, call.group_ranks) == (EXPERTS, (0, 1, 2, 3))
            assert call.dtype == "ncclBfloat16"
            assert call.placed
    assert not [one for one in found if one.operation in (Operation.SEND, Operation.RECEIVE)]


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_tell_how_long_it_took(version):
    calls = chosen(read(version), Operation.ALL_REDUCE, rank=2)
    assert [call.sequence for call in calls] == [0, 1]
    # Written: kernels seen 100 us after the call and 2 us late on rank 2, 398 us by the GPU.
    assert calls[0].duration_us == pytest.approx(398, abs=1e-3)  # clocks in nanoseconds
    assert calls[1].start_us - calls[0].start_us == pytest.approx(10000, abs=1e-6)
    assert calls[0].size == 4194304


def test_streams_from_the_host_s_calls():
    assert chosen(read("plugin_2_28"), Operation.ALL_REDUCE)[0].stream == "0x5020000567d0"
    assert chosen(read("plugin_2_27"), Operation.ALL_REDUCE)[0].stream == ""


def test_the_network_s_threads_tell_it_where_there_are_no_kernels():
    (call,) = chosen(read("plugin_2_30"), Operation.REDUCE_SCATTER)
    assert call.placed
    # Written: the last proxy event ends 333 us after the call, the operation 1 us later.
    assert call.duration_us == pytest.approx(332, abs=1e-6)


def test_a_launch_alone_tells_no_time():
    (call,) = chosen(read("plugin_2_27"), Operation.BROADCAST)
    assert not call.placed
    assert call.duration_us == 0
    assert call.bus_bandwidth is None


def test_a_group_is_unknown_unless_all_its_ranks_were_recorded():
    found = read("plugin_2_28")  # only rank 0's file of the experts' communicator
    (first, _) = chosen(found, Operation.ALL_TO_ALL)
    assert first.sent is None
    assert first.size == 64 * ROW
    assert (first.group_size, first.group_ranks) == (0, ())
    alone = read_plugin_trace([SAMPLES / "plugin_2_28" / f"trace_{WORLD}_0.json"])
    assert chosen(alone, Operation.ALL_REDUCE)[0].group_size == 0
    assert chosen(alone, Operation.ALL_GATHER)[0].size is None


def test_a_killed_process_loses_only_its_last_event():
    found = read("plugin_2_27")  # rank 3's file of the world was cut
    assert len(chosen(found, Operation.BROADCAST, rank=2)) == 1
    assert len(chosen(found, Operation.BROADCAST, rank=3)) == 0
    assert len(chosen(found, Operation.ALL_GATHER, rank=3)) == 2


def test_the_ranks_of_the_world_are_those_of_the_job():
    found = read("plugin_2_30")
    assert {one.rank for one in found} == {0, 1, 2, 3}


LINE = (
    '{"name": "AllReduce", "cat": "COLL", "ph": "b", "id": 0, "pid": 7, "tid": 1, "ts": 1.0, '
    '"args": {"SeqNum": 0, "CommHash": 5, "Rank": 0, "Count": 8, "Datatype": 7, '
    '"Algorithm": "RING"}},\n'
)
END = '{"name": "AllReduce", "cat": "COLL", "ph": "e", "id": 0, "pid": 7, "tid": 1, "ts": 2.0},\n'


def written(tmp_path: Path, text: str, name: str = "trace_5_0.json") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_nccl_2_23_numbers_its_data_types(tmp_path):
    (call,) = read_plugin_trace([written(tmp_path, "[\n" + LINE + END + "{}]\n")])
    assert (call.dtype, call.size) == ("ncclFloat32", 32)


@pytest.mark.parametrize("missing", ["SeqNum", "CommHash", "Count", "Datatype"])
def test_a_missing_argument_is_named_with_its_file(tmp_path, missing):
    path = written(tmp_path, "[\n" + LINE.replace(f'"{missing}"', '"Other"') + END + "{}]\n")
    with pytest.raises(SourceError) as caught:
        read_plugin_trace([path])
    assert str(caught.value) == f"{path}, line 2: field 'args.{missing}' is missing"


def test_a_missing_category_is_named(tmp_path):
    path = written(tmp_path, "[\n" + LINE.replace('"cat"', '"kind"') + END + "{}]\n")
    with pytest.raises(SourceError, match="line 2: field 'cat' is missing"):
        read_plugin_trace([path])


def test_an_unknown_operation_is_kept_as_other(tmp_path):
    text = (
        (LINE + END)
        .replace("AllReduce", "AllReduceQuantum")
        .replace('"Datatype": 7', '"Datatype": 99')
    )
    (call,) = read_plugin_trace([written(tmp_path, "[\n" + text + "{}]\n")])
    assert (call.operation, call.size) == (Operation.OTHER, None)


def test_copies_without_a_kernel_are_named_by_their_file(tmp_path):
    copy = (
        '{"name": "AlltoAll", "cat": "CE_COLL", "ph": "b", "id": 0, "pid": 7, "tid": 1, '
        '"ts": 10.0, "args": {"eventId": 1, "count": 100, "datatype": "ncclBfloat16", '
        '"strategy": "MC", "start_ts_cpu": 10.0, "stop_ts_cpu": 14.0, "duration_cpu_us": 4.0, '
        '"duration_gpu_us": 25}},\n'
        '{"name": "AlltoAll", "cat": "CE_COLL", "ph": "e", "id": 0, "pid": 7, "tid": 1, '
        '"ts": 40.0},\n'
    )
    paths = [
        written(
            tmp_path,
            "[\n" + copy.replace('"pid": 7', f'"pid": {rank}') + "{}]\n",
            f"t_5_{rank}.json",
        )
        for rank in range(2)
    ]
    first, second = read_plugin_trace(paths)
    assert (first.rank, second.rank) == (0, 1)
    assert first.operation is Operation.ALL_TO_ALL
    assert (first.sent, first.size, first.duration_us) == ((200, 200), 400, 25)
    renamed = written(tmp_path, "[\n" + copy + "{}]\n", "renamed.json")
    with pytest.raises(SourceError, match="PREFIX_COMMUNICATOR_RANK"):
        read_plugin_trace([renamed])


def test_a_damaged_line_is_an_error(tmp_path):
    path = written(tmp_path, "[\n" + LINE.replace('"cat"', "cat") + END + "{}]\n")
    with pytest.raises(SourceError, match="line 2: not an event on a line of its own"):
        read_plugin_trace([path])


@pytest.mark.parametrize("text", ["", "[\n", "[\n{}]\n"])
def test_a_trace_without_events_has_no_collectives(tmp_path, text):
    assert read_plugin_trace([written(tmp_path, text)]) == []
