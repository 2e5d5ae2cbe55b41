"""The cost model against results that others published: one set of efficiencies for all."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.planning.coster import GIB
from moepp_megatron.workbench.planning.machine import machine_of
from moepp_megatron.workbench.planning.memory import fullest_rank, memory_of
from moepp_megatron.workbench.planning.pipeline import even_stages, stages_of
from moepp_megatron.workbench.planning.published import (
    FURTHER,
    RESULTS,
    Published,
    compare,
    error_table,
    model_flop_per_token,
)
from moepp_megatron.workbench.planning.workload import Numbers

DOCS = Path(__file__).parents[4] / "docs" / "planning.md"


def named(name: str) -> Published:
    return next(result for result in (*RESULTS, *FURTHER) if result.name == name)


def test_five_published_results_within_15_percent() -> None:
    errors = [one.error for one in compare(RESULTS)]
    # The bounds that the project set itself (issue 10).
    assert max(map(abs, errors)) < 0.15, errors
    assert statistics.median(map(abs, errors)) < 0.10, errors


def test_the_tables_in_the_docs_are_what_the_model_says() -> None:
    text = DOCS.read_text()
    assert error_table(compare(RESULTS)) in text
    assert error_table(compare(FURTHER)) in text


@pytest.mark.parametrize(
    ("name", "flop_per_token"),
    [
        # TFLOP/s a card over tokens/s a card, arXiv 2603.07685, table 11.
        ("DeepSeek-V3 FP8", 368e12 / 1412),
        ("Qwen3-235B bf16", 320e12 / 2132),
        # 299.352 TFLOP/s at 20.14729 s a step of 1,024 sequences on 16 cards.
        ("Qwen3-30B bf16", 299.352e12 * 20.14729 * 16 / (1024 * 4096)),
        # 241 TFLOP/s at 10,494 tokens/s (Megatron-Bridge, archive, 25.09), the same model.
        ("Qwen3-30B FP8 tensorwise", 241e12 / 10494),
    ],
)
def test_model_flop_are_counted_as_published(name: str, flop_per_token: float) -> None:
    # Published numbers have three digits; Qwen3-235B's are 1.2% above the count of its weights.
    assert model_flop_per_token(named(name).load) == pytest.approx(flop_per_token, rel=0.015)


def test_published_layouts_fit_the_card() -> None:
    machine = machine_of(load_hardware("h100_sxm"))
    for result in RESULTS:
        stages = result.stages or even_stages(result.load.layers, result.grid.pp, result.grid.vpp)
        held = fullest_rank(result.load, result.grid, stages).total
        assert held + machine.reached.reserved_gib * GIB < machine.memory_bytes, result.name


def test_memory_of_deepseek_v3_in_bf16() -> None:
    """arXiv 2603.07685, table 3: 256 cards, PP4 VPP4 EP64, no recomputation."""
    result = named("DeepSeek-V3 FP8")
    load = replace(result.load, numbers=Numbers())
    grid = replace(result.grid, world=256, tp=1, pp=4, vpp=4, recompute=())
    stages = stages_of((*(4,) * 13, 3, 3, 3), 4)
    ranks = [memory_of(load, grid, stages, rank) for rank in range(4)]
    middle = ranks[1]
    # The table does not say which rank it describes; a middle one holds no vocabulary.
    assert (middle.weights + middle.gradients) / 1e9 == pytest.approx(36.4, rel=0.03)
    assert middle.optimizer / 1e9 == pytest.approx(32.1, rel=0.03)
    # 131.0 GB of activations: between the first rank's and the second's.
    assert middle.activations / 1e9 < 131.0 < ranks[0].activations / 1e9


def test_memory_of_qwen3_30b_on_16_cards() -> None:
    """61.351 GB peak allocated (Megatron-Bridge, docs/training/moe-optimization.md)."""
    result = named("Qwen3-30B bf16")
    load = replace(result.load, experts=replace(result.load.experts, dispatcher="alltoall"))
    grid = replace(result.grid, expert_overlap=False)
    held = fullest_rank(load, grid, even_stages(48, 1, 1)).total
    # The bound of the project for measured peaks (issue 10).
    assert held / 1e9 == pytest.approx(61.351, rel=0.10)
