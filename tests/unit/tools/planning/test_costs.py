"""Parts, rates, schedules and their sum."""

import random
import subprocess
import sys
from dataclasses import replace
from math import ceil

import pytest

from moepp_megatron.config import parse_config, with_overrides
from moepp_megatron.config.flops import forward_flops_per_token
from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.tools.planning.activations import kept_bytes, output_bytes
from moepp_megatron.tools.planning.grid import FULL, Grid
from moepp_megatron.tools.planning.layer_time import HOST, METADATA, layer_time
from moepp_megatron.tools.planning.machine import Machine, _Efficiencies
from moepp_megatron.tools.planning.memory import _memory_of, fullest_rank, fullest_rows
from moepp_megatron.tools.planning.parts import Layer, layer_parts, output_part
from moepp_megatron.tools.planning.pipeline import (
    _stage_sizes,
    bubble_seconds,
    chunks_in_flight,
    even_stages,
    layout_string,
)
from moepp_megatron.tools.planning.rates import _Product, _product_seconds, linear_work
from moepp_megatron.tools.planning.search import _LayoutCosts
from moepp_megatron.tools.planning.step import step_time
from moepp_megatron.tools.planning.traffic import (
    _hierarchical_rows,
    _Placement,
    exchanged_bytes,
    layer_traffic,
)
from moepp_megatron.tools.planning.workload import NumberFormats, Workload, _GroupedQuery


def configured(**moe):
    return parse_config(
        {
            "run": {"dir": "runs/test"},
            "model": {
                "num_layers": 8,
                "hidden_size": 2048,
                "ffn_hidden_size": 5632,
                "num_attention_heads": 16,
                "num_query_groups": 8,
                "seq_length": 4096,
                "vocab_size": 65536,
            },
            "moe": {"num_ffn_experts": 16, **moe},
            "precision": {"dtype": "bf16"},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 10, "global_batch_size": 512, "micro_batch_size": 1},
        }
    )


LOAD = Workload.from_config(configured())


def at_share(ffn_share):
    return replace(LOAD, experts=replace(LOAD.experts, ffn_share=ffn_share))


def flop_of(work):
    return work.core_flop + sum(product.flop for product in work.products)


def test_parts_do_the_operations_that_are_counted():
    config = configured(two_layer_gate=True, shared_expert_ffn_hidden_size=1024, layer_freq=2)
    # The configuration's count takes all scores, although half are masked.
    load = replace(Workload.from_config(config), causal_share=1.0)
    for grid in (Grid(8), Grid(8, tp=2, ep=4), Grid(8, tp=2, cp=2, ep=2, etp=2)):
        rows = grid.tokens(load.seq) * load.experts.ffn_per_token
        flop = flop_of(output_part(load, grid).forward)
        for number, is_moe in enumerate(load.is_moe):
            layer = Layer(is_moe, rows if is_moe else 0.0, number > load.first_moe_layer)
            flop += sum(flop_of(part.forward) for part in layer_parts(load, grid, layer))
        # On tp ranks the group's tokens are computed once, each with a share of the weights; the
        # router and constant experts are whole on each rank, with the rank's tokens.
        per_token = flop / grid.tokens(load.seq)
        # `s x` of the zero-computation experts is memory traffic here and 2 D FLOP there.
        assert per_token == pytest.approx(
            forward_flops_per_token(config, config.moe.ffn_share), 1e-4
        )


def test_backward_costs_twice_forward_plus_recomputed_scores():
    for part in layer_parts(LOAD, Grid(8, ep=8), Layer(True, 8192.0)):
        products = sum(product.flop for product in part.forward.products)
        assert sum(p.flop for p in part.backward.products) == pytest.approx(2 * products)
        assert part.backward.core_flop == 2.5 * part.forward.core_flop


def test_large_products_reach_the_rate_and_small_ones_do_not(h100):
    def share(product):
        return product.flop / _product_seconds(product, h100) / h100.flops(product.number)

    assert share(_Product(16384, 16384, 16384)) > 0.95
    # 64 tiles of 64 x 64 leave half of 132 multiprocessors without work.
    assert share(_Product(128, 2048, 2048)) < 0.5
    # 132 tiles fill the card once; one more row of tiles takes a second wave.
    full = _Product(128 * 12, 256 * 11, 8192)
    assert share(full) > 1.6 * share(_Product(128 * 12 + 1, 256 * 11, 8192)) * 12 / 13
    # One row and a large weight: as long as reading it takes.
    thin = _Product(1, 8192, 8192)
    assert _product_seconds(thin, h100) >= 2 * 8192 * 8192 / h100.memory_rate


def test_interleaving_shrinks_the_bubble_and_keeps_more_in_flight():
    assert bubble_seconds(7 * 3.0, 1) == 21.0
    assert bubble_seconds(7 * 3.0, 7) == 3.0
    assert chunks_in_flight(4, 1, 0, 100) == 4
    assert chunks_in_flight(4, 1, 3, 100) == 1
    assert chunks_in_flight(4, 1, 0, 2) == 2
    # megatron-core: 2 (p - 1) + (v - 1) p warm-up chunks and one at work.
    assert chunks_in_flight(8, 4, 0, 100) == 2 * 7 + 3 * 8 + 1


@pytest.mark.parametrize(("layers", "stages"), [(48, 8), (94, 32), (61, 16), (5, 4), (24, 7)])
def test_stages_hold_every_layer_once(layers, stages):
    sizes = _stage_sizes(layers, stages)
    assert sum(sizes) == layers
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 2
    assert layout_string(layers, stages).count("t") == layers
    held = even_stages(layers, stages, 1)
    assert [layer for (chunk,) in held for layer in chunk] == list(range(layers))


def test_exchanged_bytes_are_those_of_the_dispatcher():
    # 4,096 tokens, 2 x phi rows of 4,096 bytes each to 8 ranks, out and back.
    grid = Grid(8, ep=8)
    rows = 4096 * LOAD.experts.ffn_per_token * 7 / 8
    assert exchanged_bytes(LOAD, grid) == pytest.approx(2 * rows * 2048 * 2)
    assert exchanged_bytes(LOAD, Grid(8)) == 0
    once = replace(LOAD, experts=replace(LOAD.experts, dispatcher="alltoall_dedup"))
    assert exchanged_bytes(once, grid) < exchanged_bytes(LOAD, grid)


def test_what_takes_memory():
    def held(load=LOAD, **grid):
        chosen = Grid(**{"world": 64, "ep": 8, **grid})
        stages = even_stages(load.layers, chosen.pp, chosen.vpp)
        return _memory_of(load, chosen, stages, 0).activations

    base = held()
    assert held(micro_batch=2) == pytest.approx(2 * base)
    assert base > held(recompute=("moe_act",)) > held(recompute=("moe",)) > held(recompute=FULL) > 0
    assert held(tp=2) == pytest.approx(base / 2, rel=0.02)
    # Four stages, four micro-batches in flight on the first: as much as all layers once.
    assert held(pp=4) == pytest.approx(base)
    assert held(pp=4, vpp=2) > held(pp=4)
    assert held(replace(LOAD, numbers=replace(LOAD.numbers, fp8="blockwise"))) < base
    assert held(at_share(0.3)) < base < held(at_share(1.0))


def _kept(load=LOAD, **grid):
    chosen = Grid(**{"world": 8, "ep": 8, **grid})
    return kept_bytes(load, chosen, Layer(True, fullest_rows(load, chosen)))


@pytest.mark.parametrize(("tp", "heads"), [(1, 16 + 8), (4, 4 + 2), (16, 1 + 1)])
def test_norms_keep_queries_and_keys(tp, heads):
    """On a rank with several key heads, and where two ranks share one; heads wider than usual."""
    load = replace(LOAD, attention=_GroupedQuery(heads=16, groups=8, head_dim=256))
    normed = replace(load, attention=replace(load.attention, has_qk_norm=True))
    for recompute in ((), ("core_attn",)):
        grid = {"world": 16, "tp": tp, "recompute": recompute}
        assert _kept(normed, **grid) - _kept(load, **grid) == 2 * load.seq * heads * 256
    assert _kept(normed, recompute=FULL) == _kept(load, recompute=FULL)


def test_norms_inside_a_product_are_not_repeated():
    """As megatron-core does: only the norm before an MoE layer is a module of its own."""
    one = 2 * LOAD.seq * LOAD.hidden
    assert _kept() - _kept(recompute=("layernorm",)) == one
    dense = Layer(False, 0.0)
    grid = Grid(8, recompute=("layernorm",))
    assert kept_bytes(LOAD, grid, dense) == kept_bytes(LOAD, Grid(8), dense)


def test_a_repeated_layer_keeps_its_input_and_the_logits_before():
    assert _kept(recompute=FULL) == LOAD.seq * (2 * LOAD.hidden + 4 * LOAD.experts.num_experts)


def test_nodes_of_the_combined_schedule_keep_what_they_hand_on():
    """The local experts' output; hidden states with fp32 logits glued on, the logits copied."""
    wide = LOAD.experts.num_experts * 4
    more = LOAD.seq * (2 * LOAD.hidden * 2 + 2 * wide)
    assert _kept(expert_overlap=True) - _kept() == more
    nothing = dict.fromkeys(("num_zero_experts", "num_copy_experts", "num_constant_experts"), 0)
    vanilla = Workload.from_config(configured(gating_residual=False, **nothing))
    assert _kept(vanilla, expert_overlap=True) == _kept(vanilla)


def test_a_fused_loss_needs_the_logits_alone():
    grid = Grid(8)
    native = Workload.from_config(with_overrides(configured(), ["precision.cross_entropy=native"]))
    assert LOAD.loss_fused
    assert not native.loss_fused
    logits = LOAD.seq * LOAD.vocab
    # The final norm's output, its gradient, and the weight's.
    beside = (2 * LOAD.seq + LOAD.vocab) * LOAD.hidden * 2
    assert output_bytes(LOAD, grid) == 2 * logits + beside
    assert output_bytes(native, grid) == 6 * logits + beside
    fused, plain = (output_part(load, grid) for load in (LOAD, native))
    assert fused.forward.products == plain.forward.products
    # Read once; backward read once more and written.
    assert fused.forward.moved == 2 * logits
    assert plain.backward.moved - fused.backward.moved == (10 - 4) * logits


@pytest.mark.parametrize("overlap", [False, True])
def test_costs_are_those_of_the_step_and_of_the_fullest_rank(h100, overlap):
    load = replace(LOAD, is_moe=(False, False, *(True,) * 6), extra_layers=2)
    costs, grid = _LayoutCosts(load, h100), Grid(64, 2, 1, 4, 2, 8, expert_overlap=overlap)
    step = step_time(load, grid, h100)
    assert costs.seconds(grid) == pytest.approx(step.total, rel=1e-9)
    held = fullest_rank(load, grid, even_stages(load.layers, 4, 2), step.load.p99).total
    assert costs.memory(grid) == held + h100.reached.reserved_gib * 2**30


def test_planning_imports_no_torch():
    code = "import sys, moepp_megatron.tools.planning.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def narrow(**changes):
    """64 narrow experts, which a host issues more slowly than the GPU finishes them."""
    load = Workload.from_config(configured(num_ffn_experts=64, ffn_hidden_size=256, router_topk=4))
    return replace(load, **changes)


def seconds_of(load, grid, machine):
    rows = grid.tokens(load.seq) * load.experts.ffn_per_token
    return layer_time(load, grid, machine, True, rows, 1.0)


def with_reached(**values):
    return Machine.of(load_hardware("h100_sxm"), _Efficiencies.of(values, "a test"))


def test_a_slow_host_decides_over_many_small_kernels():
    grid = Grid(8, ep=2)
    fast = seconds_of(narrow(), grid, with_reached(launch_s=1e-9))
    assert HOST not in fast.seconds
    slow = seconds_of(narrow(), grid, with_reached(launch_s=60e-6))
    kernels = [
        (part.forward.kernels, part.backward.kernels)
        for part in layer_parts(narrow(), grid, Layer(True, 1024.0, True))
    ]
    # Six products an expert at least, each of its own kernel.
    assert sum(map(sum, kernels)) > 6 * 32
    assert slow.backward == pytest.approx(60e-6 * sum(back for _, back in kernels))
    assert slow.seconds[HOST] > 0
    assert slow.total > 2 * fast.total
    assert sum(slow.seconds.values()) == pytest.approx(slow.total)
    # Wide experts hide the same host.
    wide = replace(narrow(), experts=replace(narrow().experts, ffn_size=16384))
    assert HOST not in seconds_of(wide, grid, with_reached(launch_s=10e-6)).seconds


def test_casts_to_fp8_are_kernels_of_each_expert():
    grid, machine = Grid(8, ep=2), with_reached(launch_s=60e-6)
    in_bf16 = seconds_of(narrow(), grid, machine).total
    found = {
        recipe: seconds_of(narrow(numbers=NumberFormats(fp8=recipe)), grid, machine).total
        for recipe in ("blockwise", "tensorwise")
    }
    # More casts, more time: FP8 does not pay for narrow experts.
    assert in_bf16 < found["blockwise"] < found["tensorwise"]


def _experts_of(recipe, **experts):
    """64 experts of 32 rows each on two ranks."""
    load = narrow(numbers=NumberFormats(fp8=recipe))
    load = replace(load, experts=replace(load.experts, **experts))
    parts = layer_parts(load, Grid(8, ep=2), Layer(True, 32 * 32.0))
    return next(part for part in parts if part.name == "experts")


def test_delayed_scaling_casts_all_experts_in_one_kernel():
    kernels = {
        recipe: (part.forward.kernels, part.backward.kernels)
        for recipe in ("delayed", "blockwise")
        for part in [_experts_of(recipe)]
    }
    # 32 experts of a rank, two matrices.
    apart = tuple(a - b for a, b in zip(kernels["blockwise"], kernels["delayed"], strict=True))
    assert apart == (62, 62)
    # More than 64 experts do not fit one launch.
    load = narrow(numbers=NumberFormats(fp8="delayed"))
    casts = [linear_work(load, 9, 8, 8, groups)[0].kernels for groups in (1, 64, 65, 129)]
    assert casts == [1, 1, 2, 3]


def test_rows_are_copied_for_fp8_where_nothing_has_rounded_them():
    copied = _experts_of("tensorwise")
    for spared in (
        _experts_of("tensorwise", router_pads=True),
        _experts_of("tensorwise", dispatcher="flex", flex_pads=True),
    ):
        for mine, less in ((copied.forward, spared.forward), (copied.backward, spared.backward)):
            # Input and output [rows, 2048] bf16, gates [rows] fp32: each is read and written.
            assert mine.moved - less.moved == 1024 * (2 * 2 * 2048 * 2 + 2 * 4)
            assert mine.kernels - less.kernels == 3
            assert mine.products == less.products
    assert copied == _experts_of("tensorwise", dispatcher="flex", flex_pads=False)
    in_bf16 = _experts_of(None)
    assert in_bf16 == _experts_of(None, router_pads=True)


@pytest.mark.parametrize(
    ("backend", "pads"), [("auto", False), ("deepep", False), ("hybridep", True)]
)
def test_who_rounds_the_rows_of_a_flex_dispatcher(backend, pads):
    config = configured(flex_backend=backend)
    assert Workload.from_config(config).experts.flex_pads is pads


def test_unfused_parts_of_experts_move_what_they_read_and_write():
    """`TEGroupedMLP` with a bias and clamped halves, 1,024 rows of 32 experts in bf16."""
    plain = _experts_of(None)
    biased, clamped = _experts_of(None, has_bias=True), _experts_of(None, is_clamped=True)
    output = 1024 * 2048 * 2
    # Gate times bias; rows and that to a sum; all joined. Backward gradient times gate and times
    # bias, their sums, and the pieces joined.
    assert biased.forward.moved - plain.forward.moved == (1 + 3 + 2) * output
    assert biased.backward.moved - plain.backward.moved == (2 + 1 + 2 + 1 + 2) * output
    assert biased.forward.kernels - plain.forward.kernels == 2 * 32
    # Both halves read and written, and once more where they are joined; backward each is read with
    # its gradient.
    inner = (clamped.forward.moved - plain.forward.moved) / 8
    assert clamped.backward.moved - plain.backward.moved == 10 * inner
    assert clamped.forward.products == plain.forward.products


def test_products_in_fp8_have_rows_rounded_up():
    found = {
        recipe: _experts_of(recipe).forward.products[0].m for recipe in (None, "delayed", "mxfp8")
    }
    assert found == {None: 32.0, "delayed": 32 + 15 / 2, "mxfp8": 32 + 31 / 2}


def test_ranks_wait_for_sizes_once_a_forward_pass(h100):
    plain, overlapped = Grid(8, ep=4), Grid(8, ep=4, expert_overlap=True)
    reached = h100.reached
    times = [seconds_of(LOAD, grid, h100).seconds.get(METADATA) for grid in (plain, overlapped)]
    assert times == [reached.metadata_s, reached.metadata_overlapped_s]
    again = seconds_of(LOAD, replace(plain, recompute=FULL), h100)
    assert again.seconds[METADATA] == 2 * reached.metadata_s
    assert METADATA not in seconds_of(LOAD, Grid(8), h100).seconds
    gathered = LOAD.with_dispatcher("allgather")
    assert METADATA not in seconds_of(gathered, plain, h100).seconds
    graphs = frozenset({"attn", "moe_router", "moe_preprocess"})
    captured = seconds_of(replace(LOAD, graphs=graphs), plain, h100)
    assert captured.seconds[METADATA] == reached.metadata_overlapped_s


def test_static_rows_are_sent_moved_and_kept_whatever_is_needed(h100):
    """Only products leave out the rows that nobody needs; no rank waits for sizes."""
    grid, static = Grid(8, ep=4), Workload.from_config(configured(static_rows=1.25))
    needed = 4096 * LOAD.experts.ffn_per_token
    rows = 4 * ceil(1.25 * needed / 4)
    more = pytest.approx(rows / needed)
    assert exchanged_bytes(static, grid) / exchanged_bytes(LOAD, grid) == more
    stages = even_stages(8, 1, 1)
    kept = [_memory_of(load, grid, stages, 0).activations / 8 for load in (LOAD, static)]
    # The activation between the products is computed again.
    wider = rows * (2048 + 2 * 5632) - needed * (2048 + 3 * 5632)
    assert kept[1] - kept[0] == pytest.approx(2 * wider)
    parts = [
        {part.name: part for part in layer_parts(load, grid, Layer(True, needed))}
        for load in (LOAD, static)
    ]
    for name in ("experts", "permutation"):
        dynamic, fixed = (found[name] for found in parts)
        assert fixed.backward.products == dynamic.backward.products
        assert fixed.backward.moved > dynamic.backward.moved
    assert seconds_of(static, grid, h100).seconds[METADATA] == h100.reached.metadata_overlapped_s


def test_backward_one_of_three_tensor_collectives_is_exposed(h100):
    traffic = layer_traffic(LOAD, Grid(8, tp=4), h100, False)
    # Attention and FFN: a gather and a reduce-scatter each, forward.
    assert traffic.tensor_backward == pytest.approx(traffic.tensor_forward / 2)


@pytest.mark.parametrize(("ranks", "counted"), [(16, 5.77), (32, 6.43), (64, 6.80)])
def test_rows_over_nvlink_are_those_of_different_experts(ranks, counted):
    """By drawing 8 of 128 experts: every wanted rank but the one where the token lands."""
    found, _ = _hierarchical_rows(_Placement(ranks, 8), 8, 128)
    rng = random.Random(1)
    draws = 4000
    copies = 0
    for _ in range(draws):
        own = rng.randrange(8)
        wanted = {expert * ranks // 128 for expert in rng.sample(range(128), 8)}
        copies += sum(rank % 8 != own for rank in wanted)
    # The mean of 4,000 draws is within 0.03 of its expectation; counts are given to two digits.
    assert found == pytest.approx(copies / draws, abs=0.05)
    assert found == pytest.approx(counted, abs=0.015)


def test_groups_bound_the_nodes_of_a_token():
    """8 groups, 4 kept: 4 nodes of 4 or 8; of 16 nodes each group has 2, of 64 it has 8."""
    limited = configured(num_ffn_experts=128, router_topk=8, num_groups=8, group_topk=4)
    experts = Workload.from_config(limited).experts
    assert [experts.most_nodes_of(nodes) for nodes in (4, 8, 16, 64)] == [4, 4, 8, 32]
    free = Workload.from_config(configured(num_ffn_experts=128, router_topk=8)).experts
    assert free.most_nodes_of(16) is None
    across = [_hierarchical_rows(_Placement(64, 8), 8, 128, most)[1] for most in (None, 4)]
    assert across[1] == 4 * 7 / 8 < across[0]


def test_a_block_of_layers_is_recomputed(h100):
    full = Grid(8, recompute=FULL)
    some = [replace(full, recomputed_layers=count) for count in (0, 2, 4, 8)]
    times = [step_time(LOAD, grid, h100).total for grid in some]
    assert times == sorted(times)
    assert times[-1] == step_time(LOAD, full, h100).total
    assert times[0] == step_time(LOAD, Grid(8), h100).total
    # Even shares of the layers, beside what else a step does.
    assert times[2] - times[1] == pytest.approx((times[-1] - times[0]) / 4, rel=0.01)
    held = [fullest_rank(LOAD, grid, even_stages(8, 1, 1)).activations for grid in some]
    assert held == sorted(held, reverse=True)
    config = with_overrides(
        configured(),
        [
            "training.recompute_granularity=full",
            "training.recompute_method=block",
            "training.recompute_num_layers=5",
        ],
    )
    assert Grid.from_config(config, 8).recomputed_layers == 5
