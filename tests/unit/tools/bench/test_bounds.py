"""Bounds of a layer's parts, by hand, and what is measured beside them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from moepp_megatron.experts import FFN, ExpertLayout
from moepp_megatron.tools.bench import bounds
from moepp_megatron.tools.bench.bounds import (
    MinimalWork,
    RoutedLoad,
    bounds_ms,
    layer_work,
)
from moepp_megatron.tools.bench.clock import _Timed, interleaved, speedup
from moepp_megatron.tools.bench.layer import parts_ms
from moepp_megatron.tools.bench.shapes import PaperShape

# D 8, H 4, 2 FFN experts, then 2 constant, 1 copy, 1 zero.
SHAPE = PaperShape("tiny", 8, 4, 1, ExpertLayout(2, num_constant_experts=2), 1.0, {})
PICKS = torch.tensor([[0, 1], [0, 2], [4, 5], [5, 0]])
LOAD = RoutedLoad(tokens=4, rows=4, ffn_tokens=3, used_tokens=2, busy_experts=2)
# 1 GB/s and 1 or 2 TFLOP/s.
CARD = bounds.CardResult("a card", {"fp32": 1.0, "bf16": 2.0}, 1.0)


def test_load_counts_what_the_routing_asks_for():
    # The third token has a copy and a zero expert, the last a zero and an FFN expert.
    assert RoutedLoad.of(PICKS, SHAPE) == LOAD
    nothing = RoutedLoad.of(torch.tensor([[5, 3], [4, 5]]), SHAPE)
    assert nothing == RoutedLoad(tokens=2, rows=0, ffn_tokens=0, used_tokens=2, busy_experts=0)


def test_moepp_layer_by_hand():
    work = layer_work(SHAPE, LOAD, "bf16", topk=2, vanilla=False)
    # A vector is 16 bytes. Router: 4 inputs and 6 weights; logits before and G; logits, gates, map.
    router = 10 * 16 + 6 * (4 * 4 + 6 * 2) + 24 * 4 + 24 * 5
    assert work["router"] == MinimalWork(router, 2 * 4 * 6 * (8 + 6), "fp32")
    # 3 tokens in, 4 rows out, 4 gates both ways, 4 x 2 of the map.
    assert work["dispatch"] == MinimalWork(7 * 16 + 2 * 4 * 4 + 8)
    # 3 matrices of 8 x 4 an expert; 4 rows in and out.
    assert work["experts"] == MinimalWork(2 * 3 * 32 * 2 + 8 * 16, 6 * 4 * 8 * 4, "bf16")
    assert work["combine"] == MinimalWork(4 * 16 + 4 * 16)
    # 2 inputs, 4 outputs, and two constants with their two rows of mixing weights.
    assert work["zero_computation"] == MinimalWork(6 * 16 + 6 * 16)


def test_fused_layer_moves_less():
    plain = layer_work(SHAPE, LOAD, "bf16", topk=2, vanilla=False)
    fused = layer_work(SHAPE, LOAD, "bf16", topk=2, vanilla=False, fused=True)
    assert {name: fused[name] for name in ("router", "dispatch", "experts")} == {
        name: plain[name] for name in ("router", "dispatch", "experts")
    }
    # 4 rows and 2 inputs in, 4 outputs; of each token two row numbers, three gates with their map,
    # four mixing logits.
    assert fused["combine"] == MinimalWork((4 + 2 + 4) * 16 + 4 * (2 * 4 + 3 * 5 + 4 * 4))
    # Mixing logits: 2 inputs, the weights, 4 fp32 numbers a token.
    assert fused["zero_computation"] == MinimalWork(2 * 16 + 6 * 16 + 4 * 4 * 4)


def test_vanilla_layer_has_no_residual_and_no_zero_computation():
    picks = torch.tensor([[0, 1]] * 4)
    vanilla = layer_work(SHAPE, RoutedLoad.of(picks, SHAPE), "fp32", topk=2, vanilla=True)
    assert set(vanilla) == {"router", "dispatch", "experts", "combine"}
    assert vanilla["router"] == MinimalWork((4 + 2) * 32 + 8 * 5, 2 * 4 * 2 * 8, "fp32")
    assert vanilla["experts"].flops == 8 * FFN.flops(SHAPE.hidden_size, SHAPE.ffn_hidden_size)
    assert vanilla["combine"] == MinimalWork((8 + 4) * 32)


def test_fp8_multiplies_in_fp8_and_stores_in_bf16():
    in_bf16 = layer_work(SHAPE, LOAD, "bf16", topk=2, vanilla=False)
    in_fp8 = layer_work(SHAPE, LOAD, "fp8", topk=2, vanilla=False)
    assert in_fp8.pop("experts") == dataclasses.replace(in_bf16.pop("experts"), dtype="fp8")
    assert in_fp8 == in_bf16


def test_the_longer_of_moving_and_multiplying_is_the_bound():
    work = {
        "moves": MinimalWork(2 * 10**9),
        "multiplies": MinimalWork(10**9, 4 * 10**12, "bf16"),
        "in fp32": MinimalWork(10**9, 4 * 10**12, "fp32"),
        "moves more": MinimalWork(3 * 10**9, 4 * 10**12, "bf16"),
    }
    assert bounds_ms(work, CARD) == {
        "moves": 2000.0,
        "multiplies": 2000.0,
        "in fp32": 4000.0,
        "moves more": 3000.0,
    }


def test_the_paper_is_within_the_rates_of_an_h100():
    """0.6B, 16384 tokens, tau 0.75: experts bound by products, all else by memory."""
    from moepp_megatron.tools.bench.held_routing import balanced_selection, balanced_shares
    from moepp_megatron.tools.bench.shapes import SHAPES

    shape = SHAPES["0.6B"]
    generator = torch.Generator().manual_seed(1)
    picks = balanced_selection(16384, balanced_shares(8, 4, 0.75), 2, generator)
    load = RoutedLoad.of(picks, shape)
    assert load.rows == round(0.6 * 2 * 16384)
    rated = dataclasses.replace(CARD, matmul_tflops={"fp32": 67.0, "bf16": 989.4}, copy_gb_s=3350.0)
    work = layer_work(shape, load, "bf16", topk=2, vanilla=False, fused=True)
    for part, value in work.items():
        moving = value.bytes / 3350e9
        assert (value.seconds(rated) > moving) == (part == "experts"), part


def test_card_measures_products_and_copies():
    result = bounds.measure_card(("fp32", "bf16", "fp8"), size=64, num_bytes=2**16)
    assert set(result.matmul_tflops) >= {"fp32", "bf16"}
    assert ("fp8" in result.matmul_tflops) == (bounds._card_obstacle("fp8") is None)
    assert min(result.matmul_tflops.values()) > 0
    assert result.copy_gb_s > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_each_product_is_a_product(dtype):
    """The whole product of two full matrices is timed, in that format."""
    torch.manual_seed(0)
    if dtype == "fp8" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 multiplies no FP8 matrices on a CPU")
    output = bounds._matmul(dtype, 64)()
    torch.manual_seed(0)
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    number = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[dtype]
    left, right = left.to(number).float(), right.to(number).float()
    expected = left @ (right.t() if dtype == "fp8" else right)
    assert output.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    # Operands are the same numbers; the output is rounded once, to bf16 by up to 2^-8 of a value.
    assert (output.float() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_nested_parts_are_counted_once(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr("moepp_megatron.tools.bench.clock.now", lambda: clock.time)
    monkeypatch.setattr("moepp_megatron.tools.bench.clock.seconds", lambda begin, end: end - begin)

    def work(seconds):
        clock.time += seconds

    class Router:
        def forward(self):
            work(2.0)

    class Zero:
        def ingredients(self):
            work(3.0)

    class Layer:
        def __init__(self):
            self.router, self.zero_computation = Router(), Zero()

        def route(self):
            work(1.0)
            self.router.forward()

        def fused_output(self):
            work(4.0)
            self.zero_computation.ingredients()
            work(5.0)

        def routed_experts_compute(self):
            work(6.0)

    layer = Layer()

    def forward():
        layer.route()
        layer.routed_experts_compute()
        layer.fused_output()
        work(7.0)

    assert parts_ms(layer, forward, 3) == {
        "router": 3000.0,
        "experts": 6000.0,
        "zero_computation": 3000.0,
        "combine": 9000.0,
        "rest": 7000.0,
    }
    assert "route" not in vars(layer), "the layer is as it was"


def test_contestants_take_turns():
    order = []
    contestants = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    # A counter that nobody else moves: 2 J a turn of `a`, 3 of `b`.
    joules = lambda: 2.0 * order.count("a") + 3.0 * order.count("b")  # noqa: E731
    times = interleaved(contestants, rounds=3, warmup=1, queued=True, energy=joules)
    assert "".join(order) == "baabbaab"
    assert [len(timed.seconds) for timed in times.values()] == [3, 3]
    assert [timed.joules for timed in times.values()] == [2.0, 3.0]
    assert speedup(_Timed([2.0, 9.0, 4.0]), _Timed([1.0, 3.0, 2.0])) == 2.0
