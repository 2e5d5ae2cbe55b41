"""Zero-computation experts in the cost model: the joined gate, three forms, what rows wait for."""

from dataclasses import replace

import pytest

from moepp_megatron.config import with_overrides
from moepp_megatron.tools.planning.grid import FULL, Grid
from moepp_megatron.tools.planning.layer_time import EXCHANGE, layer_time
from moepp_megatron.tools.planning.parts import (
    Layer,
    _local_form,
    _zero_computation,
    layer_parts,
)
from moepp_megatron.tools.planning.rates import _Product
from moepp_megatron.tools.planning.workload import Workload
from tests.unit.tools.planning.test_costs import LOAD, configured

WITHOUT_KERNELS = Workload.from_config(with_overrides(configured(), ["moe.fused=false"]))
NOTHING = dict.fromkeys(("num_zero_experts", "num_copy_experts", "num_constant_experts"), 0)
ROWS = 8192.0
EP4 = Grid(8, ep=4)


def parts_of(load, grid, has_residual=True):
    layer = Layer(True, ROWS, has_residual)
    return {part.name: part for part in layer_parts(load, grid, layer)}


def time_of(load, grid, machine):
    return layer_time(load, grid, machine, True, ROWS, 1.0)


def test_gate_and_mixing_logits_are_one_product():
    """16 FFN, 2 constant, a copy and a zero expert; two mixing logits for each constant one."""
    products = parts_of(LOAD, Grid(8), has_residual=False)["router"].forward.products
    assert products == (_Product(LOAD.seq, 20 + 2 * 2, LOAD.hidden),)
    with_residual = parts_of(LOAD, Grid(8))["router"].forward.products
    assert with_residual == (*products, _Product(LOAD.seq, 20, 20))
    # The first layer of a gate of two has the mixing logits beside it.
    deep = Workload.from_config(configured(two_layer_gate=True))
    hidden = parts_of(deep, Grid(8))["router"].forward.products
    widths = [n for n, _ in deep.experts.gate_shapes(deep.hidden)]
    assert [product.n for product in hidden] == [widths[0] + 4, widths[1], 20]


@pytest.mark.parametrize(
    ("dispatcher", "grid", "form"),
    [
        ("alltoall", Grid(8), "combined"),
        ("alltoall", EP4, "apart"),
        ("alltoall_dedup", EP4, "apart"),
        ("allgather", EP4, "apart"),
        ("allgather", Grid(8), "apart"),
        ("flex", EP4, "apart"),
    ],
)
def test_the_form_is_that_of_the_layer(dispatcher, grid, form):
    assert _local_form(LOAD.with_dispatcher(dispatcher), grid) == form
    assert _local_form(WITHOUT_KERNELS.with_dispatcher(dispatcher), grid) == "plain"


def test_kernels_move_less_the_more_they_do_at_once(h100):
    combined, apart, plain = (
        _zero_computation(load, grid)
        for load, grid in ((LOAD, Grid(8)), (LOAD, EP4), (WITHOUT_KERNELS, EP4))
    )
    for which in ("forward", "backward"):
        works = [getattr(form, which) for form in (combined, apart, plain)]
        assert len({work.products for work in works}) == 1
        seconds = [work.seconds(h100) for work in works]
        assert seconds == sorted(seconds)
        assert len(set(seconds)) == 3
    # x; x, what is written and read again, and next to it A and V.
    tensor = LOAD.seq * LOAD.hidden * 2
    for part, tensors in ((combined, 1), (apart, 3)):
        moved = part.forward.moved + sum(product.moved for product in part.forward.products)
        assert moved == pytest.approx(tensors * tensor, rel=0.01)
    # Gradients of gates; parts of V's added up and rounded.
    assert [combined.forward.kernels, combined.backward.kernels] == [0, 3]
    assert [apart.forward.kernels, apart.backward.kernels] == [1, 7]


@pytest.mark.parametrize("dispatcher", ["alltoall", "alltoall_dedup"])
def test_zero_computation_run_while_rows_travel(h100, dispatcher):
    load = LOAD.with_dispatcher(dispatcher)
    local = parts_of(load, EP4)["zero_computation"]
    seconds = [work.seconds(h100) for work in (local.forward, local.backward)]
    time = time_of(load, EP4, h100)
    # The way back is longer than that: all of it is hidden.
    assert time.hidden[EXCHANGE] == pytest.approx(sum(seconds))
    in_all = time.hidden[EXCHANGE] + time.seconds[EXCHANGE]
    assert sum(seconds) < in_all / 4
    # Repeated, the forward pass hides as much again.
    again = time_of(load, replace(EP4, recompute=FULL), h100)
    assert again.hidden[EXCHANGE] == pytest.approx(sum(seconds) + seconds[0])


def test_shared_experts_hide_no_more_than_the_way_there(h100):
    large = replace(LOAD, experts=replace(LOAD.experts, shared_size=50_000))
    without, time = (time_of(load, EP4, h100) for load in (LOAD, large))
    in_all = time.hidden[EXCHANGE] + time.seconds[EXCHANGE]
    assert in_all == pytest.approx(without.hidden[EXCHANGE] + without.seconds[EXCHANGE])
    there = in_all / 2 * (1.0 - h100.reached.overlap_slowdown)
    assert time.hidden[EXCHANGE] - without.hidden[EXCHANGE] == pytest.approx(there)


def test_what_does_not_wait_hides_nothing(h100):
    vanilla = Workload.from_config(
        configured(gating_residual=False, shared_expert_ffn_hidden_size=1024, **NOTHING)
    )
    cases = [
        (LOAD.with_dispatcher("flex"), EP4),
        (LOAD.with_dispatcher("allgather"), EP4),
        (LOAD, Grid(8, ep=2, etp=2)),
        # Passes that the combined schedule runs alone.
        (LOAD, replace(EP4, expert_overlap=True).apart),
        (vanilla, EP4),
    ]
    for load, grid in cases:
        assert EXCHANGE not in time_of(load, grid, h100).hidden, grid
    assert time_of(LOAD, EP4.apart, h100).hidden == time_of(LOAD, EP4, h100).hidden
