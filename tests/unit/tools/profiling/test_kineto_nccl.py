"""NCCL in torch's traces: a sample written from the documented arguments, and single events."""

from pathlib import Path

import pytest

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.profiling.analysis import _load_profile, analyse
from moepp_megatron.tools.profiling.formats.c10d import _bytes_of_type, operation_of
from moepp_megatron.tools.profiling.formats.kineto import _parse_kineto
from moepp_megatron.tools.profiling.formats.records import whole_list
from moepp_megatron.tools.profiling.measures.classes import _link_of
from moepp_megatron.tools.profiling.measures.purpose import Place, place_of
from moepp_megatron.tools.profiling.trace import Operation

SAMPLE = Path(__file__).parent / "samples/kineto_nccl"


@pytest.fixture(scope="module")
def profile():
    return analyse(SAMPLE)


def by_operation(profile, rank):
    return {one.operation: one for one in profile.traces[rank].collectives}


def test_uneven_all_to_all(profile):
    first, second = (by_operation(profile, rank)[Operation.ALL_TO_ALL] for rank in (0, 1))
    # Rows of 1024 bf16.
    assert (first.sent, first.received) == ((3 * 2048, 5 * 2048), (3 * 2048, 2 * 2048))
    assert (second.sent, second.received) == ((2 * 2048, 6 * 2048), (5 * 2048, 6 * 2048))
    assert first.sent[1] == second.received[0]
    assert (first.size, second.size) == (8 * 2048, 11 * 2048)
    assert first.row_bytes == 2048
    assert first.group == "23"
    assert first.group_ranks == (0, 1)
    assert place_of(first) == Place(1, "dispatch", "forward")
    assert first.sequence == 0


def test_times_and_bandwidth(profile):
    one = by_operation(profile, 0)[Operation.REDUCE_SCATTER]
    assert one.size == 2097152 * 4
    assert one.duration_us == 100.0
    # nccl-tests: 8 MiB in 100 us, and half of it over the bus of two ranks.
    kind = next(one for one in profile.classes if one.name.operation is Operation.REDUCE_SCATTER)
    assert kind.bus_gb_s == pytest.approx(41.94304)


def test_waiting_is_told_from_transfer(profile):
    exchange = next(one for one in profile.classes if one.name.purpose == "dispatch")
    # Rank 1 starts 40 us later; both end together.
    assert (exchange.time_us, exchange.wait_us) == (150.0 + 110.0, 40.0)
    assert profile.critical_rank == 1
    assert profile.caused_us == {0: 0.0, 1: 40.0}


def test_exposure(profile):
    time = profile.times[7][0]
    assert (time.step_us, time.compute_us) == (1000.0, 200.0)
    # All-to-all 100..250 beside a kernel 50..150; the other two with nothing beside them.
    assert time.communication_us == 150.0 + 100.0 + 50.0
    assert time.exposed_us == 100.0 + 100.0 + 50.0
    assert profile.times[7][1].exposed_us == 100.0 + 100.0 + 50.0


def test_purposes_and_peaks(profile):
    found = {one.name.purpose: one for one in profile.classes}
    assert set(found) == {"dispatch", "gradient reduce", "parameter gather"}
    reduce = found["gradient reduce"]
    assert reduce.link == "NVLink"
    # H100: 900 GB/s in both directions together.
    assert reduce.peak_gb_s == pytest.approx(450.0)
    assert reduce.peak_share == pytest.approx(41.94304 / 450.0)


def test_bytes_and_routing(profile):
    # Other parts of the sample's pass were not recorded: nothing measured, nothing equal.
    (dispatch,) = [one for one in profile.layers[7] if one.place == Place(1, "dispatch", "forward")]
    assert dispatch.measured == dispatch.expected == (5 + 2) * 2048
    assert dispatch.deduplicated == (4 + 2) * 2048
    # T K D b (EP - 1) / EP.
    assert dispatch.vanilla == 16 * 2 * 2048 / 2


def test_network_between_nodes():
    call, h100 = _load_profile(SAMPLE)[0].collectives[0], load_hardware("h100_sxm")
    # 400 Gbit/s a card.
    assert _link_of(call, ["node-a", "node-b"], h100, True) == ("network", 50.0)
    assert _link_of(call, ["node-a"], h100, True) == ("unknown", None)


def kernel(**args):
    """A trace with one NCCL kernel."""
    event = {
        "ph": "X",
        "cat": "kernel",
        "name": "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
        "pid": 0,
        "tid": 20,
        "ts": 1.0,
        "dur": 2.0,
        "args": {"stream": 20, **args},
    }
    return {"traceEvents": [event], "distributedInfo": {"backend": "nccl", "rank": 5}}


def exchange(**args):
    defaults = {
        "Collective name": "all_to_allv",
        "In msg nelems": 64,
        "Out msg nelems": 64,
        "dtype": "BFloat16",
        "Group size": 64,
    }
    (found,) = _parse_kineto(kernel(**{**defaults, **args})).collectives
    return found


def test_split_list_cut_short():
    rows = ", ".join(["1"] * 30)
    found = exchange(**{"In split size": f"[{rows}, ...]", "Out split size": f"[{rows}, ...]"})
    assert (found.size, found.group_size) == (128, 64)
    assert found.sent is None
    assert found.received is None


def test_even_all_to_all_has_no_splits():
    found = exchange(**{"In split size": "[]", "Out split size": "[]"})
    assert found.sent == found.received == (2,) * 64


def test_nothing_to_send():
    found = exchange(
        **{
            "In msg nelems": 0,
            "Out msg nelems": 6,
            "Group size": 2,
            "In split size": "[0, 0]",
            "Out split size": "[0, 3]",
        }
    )
    assert (found.sent, found.received, found.row_bytes) == ((0, 0), (0, 12), 4)


def test_kernel_that_says_nothing():
    content = kernel()
    content["traceEvents"][0]["name"] = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(args)"
    (found,) = _parse_kineto(content).collectives
    assert (found.operation, found.size, found.rank) == (Operation.ALL_REDUCE, None, 5)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("c10d::alltoall_base_", Operation.ALL_TO_ALL),
        ("_reduce_scatter_base", Operation.REDUCE_SCATTER),
        ("allreduce_coalesced", Operation.ALL_REDUCE),
        ("_reduce_oop", Operation.REDUCE),
        ("gloo:recv", Operation.RECEIVE),
        ("all_reduce_barrier", Operation.BARRIER),
        ("wait", Operation.OTHER),
    ],
)
def test_names(name, operation):
    assert operation_of(name) is operation


def test_all_operations_of_torch_are_known():
    kinds = pytest.importorskip("torch.distributed.flight_recorder.components.types")
    unknown = {n for n in kinds.COLLECTIVES | kinds.P2P if operation_of(n) is Operation.OTHER}
    assert unknown <= {"new_window", "split"}, "what sends nothing"


def test_types_and_lists():
    assert (_bytes_of_type("ComplexDouble"), _bytes_of_type("UInt16")) == (16, 2)
    assert _bytes_of_type("Float8_e4m3fn") == _bytes_of_type("c10::Float8_e5m2") == 1
    assert _bytes_of_type("c10::BFloat16") == _bytes_of_type("Half") == 2
    assert _bytes_of_type("ScalarList") is None
    assert whole_list("[1, 2]") == [1, 2]
    assert whole_list("[1, 2, ...]") is None
    assert whole_list("") is None
