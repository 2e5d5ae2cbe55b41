"""Multi-token prediction trains in every layout what it trains on one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import ConfigError, parse_config
from tests.parallel.checkpoint_runs import continue_in_another_layout
from tests.parallel.ranks import RankPools
from tests.parallel.test_latent_attention import MODEL as LATENT
from tests.parallel.training_runs import CP2, EP2, FULL, PP2, TP2, VANILLA, Run, compare, short

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
# Two depths, and a weight at which their gradients show.
MODEL: dict[str, Any] = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}
MOE_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
Sections = dict[str, dict[str, Any]]
# Ranks, what differs in the layout alone, and what differs in its reference too.
LAYOUTS: dict[str, tuple[int, Sections, Sections]] = {
    "tp2 ep2, layers again": (2, {"parallel": {**TP2, **EP2}, "training": FULL}, {}),
    "dp2 ep2, MoE layers again": (2, {"parallel": EP2, "training": MOE_AGAIN}, {}),
    "cp2": (2, {"parallel": CP2}, {}),
    # The embedding is on both stages, its gradient the sum of both.
    "tp2 pp2, whole optimizer": (
        4,
        {"parallel": {**TP2, **PP2, "use_distributed_optimizer": False}},
        {},
    ),
    "pp2 ep2, micro-batches of one": (
        4,
        {"parallel": {**PP2, **EP2}},
        # The balance loss is of a micro-batch.
        {"training": {"micro_batch_size": 1}},
    ),
    "pp2 interleaved": (
        2,
        {"parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}},
        {"model": {"num_layers": 4}},
    ),
    "pp2 uneven": (
        2,
        {"parallel": {**PP2, "pipeline_model_parallel_layout": "Ettt|tmmL"}},
        {"model": {"num_layers": 4}},
    ),
}


def further(model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Sections:
    """Settings of a run; a z-loss, so that megatron-core's tracker counts these layers too."""
    moe = {"num_ffn_experts": 8, "z_loss_coeff": 0.01}
    return short(model=MODEL | (model or {}), **{"moe": moe, **sections})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, alone: Callable[..., Run], layout: str) -> None:
    world_size, sections, both = LAYOUTS[layout]
    run = trained(world_size, further(**sections, **both))
    compare(run, alone(further(**both)), FP32)


def test_its_layers_are_measured_as_the_decoders_next(alone: Callable[..., Run]) -> None:
    run = alone(further())
    shares = run.routing[0]["layer_expert_share"]
    assert len(shares) == 2 + 2
    assert all(abs(sum(layer) - 1.0) < 1e-9 for layer in shares)
    layers = {name.split("mtp.layers.")[1][0] for name in run.gradients if "mtp" in name}
    assert layers == {"0", "1"}
    residuals = [name for name in run.gradients if "residual_weight" in name]
    assert len(residuals) == 3, residuals
    assert all(abs(run.gradients[name]).max() > 0 for name in residuals)
    # Untrained: about that of a guess among the 64 tokens of the vocabulary, and not the zero
    # that unread sums would give.
    assert 3.0 < run.mtp_losses[0] < 8.0


@pytest.mark.parametrize(
    ("model", "moe", "parallel"),
    [
        ({"mtp_num_layers": 1, "qk_layernorm": True}, {}, PP2),
        (LATENT | {"tie_embeddings": True}, {}, TP2),
        ({}, {"gating_residual": False}, TP2 | EP2),
        ({"num_layers": 3}, {"layer_freq": [0, 1, 0]}, TP2 | EP2),
        ({}, VANILLA, TP2 | EP2),
    ],
    ids=["one depth", "tied embeddings, latent attention", "no residual", "dense", "vanilla"],
)
def test_other_models(trained, alone, model, moe, parallel):
    moe = {"num_ffn_experts": 8, **moe}
    run = trained(2, further(model, moe=moe, parallel=parallel))
    compare(run, alone(further(model, moe=moe)), FP32)


def test_checkpoint_of_another_layout(ranks: RankPools, tmp_path: Path) -> None:
    """Saved with tensor parallelism, read by two stages: their two embeddings are one tensor."""
    from moepp_megatron.training.checkpoint.compatible import check_compatible

    start = continue_in_another_layout(ranks, tmp_path, further, TP2, PP2)
    with pytest.raises(ConfigError, match=r"model\.mtp_num_layers \(1\) must be that"):
        check_compatible(start, parse_config(further({"mtp_num_layers": 1})))
