"""The model assembled as a HybridModel is the model assembled as a GPTModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import (
    SyntheticDataset,
    assemble,
    compare,
    settings,
    train,
)

HYBRID = {"implementation": "hybrid"}
# Both assemblies do the same operations in the same order.
EXACT = 0.0
# As in test_training_layouts.py: another layout adds up in another order.
FP32 = 1e-5

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 vpp2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
}
UNIFORM = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
BLOCK = {**UNIFORM, "recompute_method": "block"}
PP2 = {"pipeline_model_parallel_size": 2}
VANILLA = {
    "num_zero_experts": 0,
    "num_copy_experts": 0,
    "num_constant_experts": 0,
    "gating_residual": False,
}

# Ranks and settings by section; what a lane or a pattern could get wrong.
CORNERS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "first layer dense, pp2": (2, {"moe": {"layer_freq": [0, 1, 0, 1]}, "parallel": PP2}),
    "uneven stages": (
        2,
        {"parallel": {**PP2, "pipeline_model_parallel_layout": "Ettt|tL"}},
    ),
    "no layer on the first stage": (
        2,
        {"parallel": {**PP2, "pipeline_model_parallel_layout": "E|ttttL"}},
    ),
    "vpp2, embedding and loss alone": (
        2,
        {
            "parallel": {
                **PP2,
                "virtual_pipeline_model_parallel_size": 2,
                "pipeline_model_parallel_layout": "E|tt|tt|L",
            }
        },
    ),
    "block recompute, pp2": (2, {"parallel": PP2, "training": BLOCK}),
    "selective recompute, shared expert": (
        1,
        {
            "moe": {"shared_expert_ffn_hidden_size": 16},
            "training": {"recompute_granularity": "selective"},
        },
    ),
    "no gating residual, pp2": (2, {"moe": {"gating_residual": False}, "parallel": PP2}),
    "vanilla, pp2": (2, {"moe": VANILLA, "parallel": PP2}),
    "tied embeddings, pp2": (2, {"model": {"tie_embeddings": True}, "parallel": PP2}),
    "bf16, pp2": (2, {"precision": {"dtype": "bf16"}, "parallel": PP2}),
}


def as_hybrid(sections: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {**sections, "model": {**sections.get("model", {}), **HYBRID}}


def check_hybrid_equals_gpt(
    ranks: RankPools, world_size: int, sections: dict[str, dict[str, Any]], steps: int
) -> None:
    gpt = assemble(ranks(world_size).run(train, settings(**sections), steps))
    hybrid = assemble(ranks(world_size).run(train, settings(**as_hybrid(sections)), steps))
    compare(hybrid, gpt, EXACT)


@pytest.mark.parallel
@pytest.mark.parametrize("training", [{}, UNIFORM], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid_equals_gpt(ranks: RankPools, layout: str, training: dict[str, Any]) -> None:
    world_size, parallel = LAYOUTS[layout]
    check_hybrid_equals_gpt(ranks, world_size, {"parallel": parallel, "training": training}, 5)


@pytest.mark.parallel
@pytest.mark.matrix
@pytest.mark.parametrize("corner", CORNERS)
def test_hybrid_equals_gpt_in_corners(ranks: RankPools, corner: str) -> None:
    world_size, sections = CORNERS[corner]
    check_hybrid_equals_gpt(ranks, world_size, sections, 5)


def train_between(
    raw: dict[str, Any], first: int, last: int, load: Path | None, folder: Path
) -> list[float]:
    """Losses of steps first to last - 1, from a checkpoint if there is one; writes the next."""
    import torch.distributed as dist

    from moepp_megatron.config import Layout
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.checkpoint import Progress, load_checkpoint, save_checkpoint
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    config = parse_config(raw)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    progress = Progress() if load is None else load_checkpoint(load, model, config)
    assert progress.step == first
    consumed = progress.consumed_samples
    batches = rank_batches(SyntheticDataset(config, 10), consumed, config, len(model.chunks))
    losses = [
        mean_loss(training_step(model, batches, config, layout).losses) for _ in range(first, last)
    ]
    samples = last * config.training.global_batch_size
    progress = Progress(last, samples, samples * config.model.seq_length)
    save_checkpoint(folder, model, progress, config, folder / "tokenizer.json")
    return losses


@pytest.mark.parallel
@pytest.mark.parametrize(
    ("writer", "reader"), [("gpt", "hybrid"), ("hybrid", "gpt"), ("hybrid", "hybrid")]
)
def test_either_assembly_resumes_the_other(
    ranks: RankPools, tmp_path: Path, writer: str, reader: str
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    uninterrupted = assemble(ranks(1).run(train, settings(), 4)).losses
    raw = settings(model={"implementation": writer}, parallel=LAYOUTS["pp2"][1])
    ranks(2).run(train_between, raw, 0, 2, None, tmp_path)
    raw = settings(model={"implementation": reader}, parallel=LAYOUTS["ep2"][1])
    checkpoint = tmp_path / "step_00000002"
    losses = ranks(2).run(train_between, raw, 2, 4, checkpoint, tmp_path)[0]
    np.testing.assert_allclose(losses, uninterrupted[2:], rtol=FP32)


def lane_in_megatrons_stack(raw: dict[str, Any]) -> tuple[str, str]:
    """The model's class, and how megatron-core's own forward of the stack ends."""
    import torch
    from megatron.core.models.hybrid.hybrid_block import HybridStack

    from moepp_megatron.config import Layout
    from moepp_megatron.model.build import build_model
    from moepp_megatron.runtime.distributed import build_groups

    config = parse_config(raw)
    build_groups(config, Layout.from_config(config, 1))
    (model,) = build_model(config)
    hidden = torch.zeros(config.model.seq_length, 1, config.model.hidden_size)
    rotary = model.rotary_pos_emb(config.model.seq_length)
    try:
        HybridStack.forward(model.decoder, hidden, None, rotary_pos_emb=rotary)
    except AssertionError as error:
        return type(model).__name__, str(error)
    return type(model).__name__, "no error"


@pytest.mark.parallel
def test_megatrons_stack_has_no_lane(ranks: RankPools) -> None:
    """Why MoEPPHybridStack exists; when this fails, megatron-core may have made it needless."""
    name, error = ranks(1).run(lane_in_megatrons_stack, settings(model=HYBRID))[0]
    assert name == "HybridModel"
    assert "was given no logits" in error


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ({}, "*E*E*E*E"),
        ({"moe": {"layer_freq": 2}}, "*E*-*E*-"),
        ({"parallel": PP2}, "*E*E|*E*E"),
        ({"parallel": LAYOUTS["pp2 vpp2"][1]}, "*E|*E|*E|*E"),
        (CORNERS["uneven stages"][1], "*E*E*E|*E"),
        (CORNERS["vpp2, embedding and loss alone"][1], "|*E*E|*E*E|"),
    ],
)
def test_pattern(sections: dict[str, dict[str, Any]], pattern: str) -> None:
    from moepp_megatron.model.hybrid import hybrid_layer_pattern

    assert hybrid_layer_pattern(parse_config(settings(**sections))) == pattern
