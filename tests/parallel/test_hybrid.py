"""The model assembled as a HybridModel is the model assembled as a GPTModel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.checkpoint.names import checkpoint_name
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    PP2,
    STEPS,
    TP2,
    VANILLA,
    Run,
    SyntheticDataset,
    assemble,
    begin_training,
    compare,
    settings,
    short,
    train,
)

HYBRID = {"implementation": "hybrid"}
# Both assemblies do the same operations in the same order.
EXACT = 0.0
# As in test_training_layouts.py: another layout adds up in another order.
FP32 = 1e-5

FOUR_LAYERS = {"model": {"num_layers": 4}}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
# Ranks and settings by section.
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one process": (1, FOUR_LAYERS),
    "tp2 ep2": (2, {"parallel": {**TP2, **EP2}}),
    "pp2 vpp2": (2, {"parallel": VPP2, **FOUR_LAYERS}),
}
BLOCK = {**FULL, "recompute_method": "block"}

# What a lane or a pattern could get wrong.
CORNERS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "cp2": (2, {"parallel": CP2}),
    "pp2": (2, {"parallel": PP2}),
    "first layer dense, pp2": (2, {"moe": {"layer_freq": [0, 1, 0, 1]}, "parallel": PP2}),
    "uneven stages": (2, {"parallel": {**PP2, "pipeline_model_parallel_layout": "Ettt|tL"}}),
    "no layer on the first stage": (
        2,
        {"parallel": {**PP2, "pipeline_model_parallel_layout": "E|ttttL"}},
    ),
    "vpp2, embedding and loss alone": (
        2,
        {"parallel": {**VPP2, "pipeline_model_parallel_layout": "E|tt|tt|L"}},
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
    ranks: RankPools, world_size: int, sections: dict[str, dict[str, Any]]
) -> None:
    gpt = assemble(ranks(world_size).run(train, short(**sections), STEPS))
    hybrid = assemble(ranks(world_size).run(train, short(**as_hybrid(sections)), STEPS))
    compare(hybrid, gpt, EXACT)


@pytest.mark.parallel
@pytest.mark.parametrize("training", [{}, FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hybrid_equals_gpt(ranks: RankPools, layout: str, training: dict[str, Any]) -> None:
    world_size, sections = LAYOUTS[layout]
    check_hybrid_equals_gpt(ranks, world_size, {**sections, "training": training})


@pytest.mark.parallel
@pytest.mark.matrix
@pytest.mark.parametrize("corner", CORNERS)
def test_hybrid_equals_gpt_in_corners(ranks: RankPools, corner: str) -> None:
    world_size, sections = CORNERS[corner]
    model = {**FOUR_LAYERS["model"], **sections.get("model", {})}
    check_hybrid_equals_gpt(ranks, world_size, {**sections, "model": model})


def resume(
    raw: dict[str, Any], folder: Path, is_writer: bool, weights_only: bool = False
) -> list[float]:
    """Losses: the writer's of step 0, then saved; the reader's of steps 1 and 2 from there."""
    from moepp_megatron.training import checkpoint
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)

    def losses_of(first: int, steps: int) -> list[float]:
        consumed = first * config.training.global_batch_size
        dataset = SyntheticDataset(config, first + steps)
        batches = rank_batches(dataset, consumed, config, len(model.chunks))
        return [
            mean_loss(training_step(model, batches, config, layout).losses) for _ in range(steps)
        ]

    if is_writer:
        losses = losses_of(0, 1)
        tokenizer = folder / "tokenizer.json"
        checkpoint.save_checkpoint(folder, model, checkpoint.Progress(step=1), config, tokenizer)
        return losses
    saved = folder / checkpoint_name(1)
    if weights_only:
        checkpoint.load_weights(saved, model.models)
        # The first loss is of the loaded weights alone; a second needs the optimizer's state.
        return losses_of(1, 1)
    checkpoint.load_checkpoint(saved, model, config)
    return losses_of(1, 2)


@pytest.mark.parallel
@pytest.mark.parametrize(("writer", "reader"), [("gpt", "hybrid"), ("hybrid", "gpt")])
def test_either_assembly_loads_the_others_weights(
    ranks: RankPools, alone: Callable[..., Run], tmp_path: Path, writer: str, reader: str
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    raw = short(model={"implementation": writer}, parallel=PP2)
    ranks(2).run(resume, raw, tmp_path, is_writer=True)
    raw = short(model={"implementation": reader}, parallel=EP2)
    losses = ranks(2).run(resume, raw, tmp_path, is_writer=False, weights_only=True)[0]
    np.testing.assert_allclose(losses, alone(short()).losses[1:], rtol=FP32)


@pytest.mark.parallel
def test_either_assembly_resumes_the_other(ranks: RankPools, tmp_path: Path) -> None:
    """Weights, optimizer and schedule, as far as the GPT assembly resumes itself."""
    losses = {}
    for writer in ("gpt", "hybrid"):
        folder = tmp_path / writer
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
        one_optimizer = {"use_distributed_optimizer": False}
        raw = short(model={"implementation": writer}, parallel=one_optimizer)
        ranks(1).run(resume, raw, folder, is_writer=True)
        for reader in ("gpt", "hybrid"):
            raw = short(model={"implementation": reader}, parallel=one_optimizer)
            losses[writer, reader] = ranks(1).run(resume, raw, folder, is_writer=False)[0]
    assert all(of_pair == losses["gpt", "gpt"] for of_pair in losses.values()), losses


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
    assert name == "MoEPPHybridModel"
    assert "was given no logits" in error


@pytest.mark.parametrize(
    ("sections", "pattern"),
    [
        ({}, "*E*E*E*E"),
        ({"moe": {"layer_freq": 2}}, "*E*-*E*-"),
        ({"parallel": PP2}, "*E*E|*E*E"),
        ({"parallel": VPP2}, "*E|*E|*E|*E"),
        (CORNERS["uneven stages"][1], "*E*E*E|*E"),
        (CORNERS["vpp2, embedding and loss alone"][1], "|*E*E|*E*E|"),
    ],
)
def test_pattern(sections: dict[str, dict[str, Any]], pattern: str) -> None:
    from moepp_megatron.model.hybrid import hybrid_layer_pattern

    assert hybrid_layer_pattern(parse_config(settings(**sections))) == pattern
