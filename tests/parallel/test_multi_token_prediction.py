"""Multi-token prediction trains in every layout what it trains on one process.

That one process computes what plain PyTorch does is tested in tests/unit/moe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config import ConfigError, parse_config
from tests.parallel.checkpoint_runs import train_between
from tests.parallel.ranks import RankPools
from tests.parallel.test_latent_attention import MODEL as LATENT
from tests.parallel.training_runs import Run, assemble, begin_training, compare, settings, train

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
STEPS = 3
# Two depths, and a weight at which their gradients show.
MODEL: dict[str, Any] = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
Sections = dict[str, dict[str, Any]]
LAYOUTS: dict[str, tuple[int, Sections]] = {
    "one rank, layers again": (1, {"training": FULL}),
    "one rank, MoE layers again": (
        1,
        {"training": {"recompute_granularity": "selective", "recompute_modules": ["moe"]}},
    ),
    "dp2": (2, {}),
    "tp2, layers again": (2, {"parallel": TP2, "training": FULL}),
    "ep2": (2, {"parallel": EP2}),
    # The embedding is on both stages, its gradient the sum of both.
    "pp2": (2, {"parallel": PP2}),
    "pp2 interleaved": (
        2,
        {"parallel": {**PP2, "virtual_pipeline_model_parallel_size": 2}},
    ),
    "pp2 uneven": (
        2,
        {"parallel": {**PP2, "pipeline_model_parallel_layout": "Ettt|tmmL"}},
    ),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
    "tp2 pp2, whole optimizer": (
        4,
        {"parallel": {**TP2, **PP2, "use_distributed_optimizer": False}},
    ),
    "pp2 ep2, micro-batches of one": (
        4,
        {"parallel": {**PP2, **EP2}, "training": {"micro_batch_size": 1}},
    ),
}


def further(model: dict[str, Any] = MODEL, **sections: dict[str, Any]) -> Sections:
    """Settings of a run; a z-loss, so that megatron-core's tracker counts these layers too."""
    return settings(model=model, moe={"num_ffn_experts": 8, "z_loss_coeff": 0.01}, **sections)


@pytest.fixture(scope="module")
def one_process(ranks: RankPools) -> Run:
    return assemble(ranks(1).run(train, further(), STEPS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ranks: RankPools, one_process: Run, layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    expected = one_process
    if sections.get("training", {}).get("micro_batch_size") == 1:
        # The balance loss is of a micro-batch.
        expected = assemble(ranks(1).run(train, further(training=sections["training"]), STEPS))
    run = assemble(ranks(world_size).run(train, further(**sections), STEPS))
    compare(run, expected, FP32)


def test_its_layers_are_measured_as_the_decoders_next(one_process: Run) -> None:
    shares = one_process.routing[0]["layer_expert_share"]
    assert len(shares) == 4 + 2
    assert all(abs(sum(layer) - 1.0) < 1e-9 for layer in shares)
    layers = {name.split("mtp.layers.")[1][0] for name in one_process.gradients if "mtp" in name}
    assert layers == {"0", "1"}
    residuals = [name for name in one_process.gradients if "residual_weight" in name]
    assert len(residuals) == 5, residuals
    assert all(abs(one_process.gradients[name]).max() > 0 for name in residuals)


def test_pipeline_of_another_model(ranks: RankPools) -> None:
    model = {"mtp_num_layers": 1, "qk_layernorm": True}
    expected = assemble(ranks(1).run(train, further(model), STEPS))
    run = assemble(ranks(2).run(train, further(model, parallel=PP2), STEPS))
    compare(run, expected, FP32)


def test_tied_embeddings_and_latent_attention(ranks: RankPools) -> None:
    model = MODEL | LATENT | {"tie_embeddings": True}
    expected = assemble(ranks(1).run(train, further(model), STEPS))
    run = assemble(ranks(2).run(train, further(model, parallel=TP2), STEPS))
    compare(run, expected, FP32)


@pytest.mark.parametrize(
    "moe",
    [
        {"gating_residual": False},
        {"layer_freq": [0, 1, 1, 0]},
        {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 0,
         "gating_residual": False},
    ],
    ids=["no residual", "dense", "vanilla"],
)  # fmt: skip
def test_other_layers(ranks: RankPools, moe: dict[str, Any]) -> None:
    raw = settings(model=MODEL, moe={"num_ffn_experts": 8, **moe})
    expected = assemble(ranks(1).run(train, raw, STEPS))
    run = assemble(ranks(2).run(train, {**raw, "parallel": {**TP2, **EP2}}, STEPS))
    compare(run, expected, FP32)


def test_checkpoint_of_another_layout(ranks: RankPools, tmp_path: Path) -> None:
    """Saved with tensor parallelism, read by two stages: their two embeddings are one tensor."""
    from moepp_megatron.training.checkpoint.compatible import check_compatible

    (whole,) = ranks(1).run(train_between, further(), tmp_path / "whole", 4)
    begun = ranks(2).run(train_between, further(parallel=TP2), tmp_path / "half", 2)[0]
    (start,) = (tmp_path / "half").glob("step_*")
    ended = ranks(2).run(train_between, further(parallel=PP2), tmp_path / "rest", 4, start)[0]
    np.testing.assert_allclose([*begun, *ended], whole, rtol=FP32)
    with pytest.raises(ConfigError, match=r"model\.mtp_num_layers \(1\) must be that"):
        check_compatible(start, parse_config(further(MODEL | {"mtp_num_layers": 1})))


def logged_loss(raw: Sections) -> float:
    """`mtp_loss` of one step, as every rank records it."""
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.further_tokens import FurtherTokens
    from moepp_megatron.training.step import compute_gradients
    from tests.parallel.training_runs import SyntheticDataset

    config, layout, model = begin_training(raw)
    tokens = FurtherTokens(model, config.model.mtp_num_layers)
    for _ in range(2):
        tokens.reset()
        batches = rank_batches(SyntheticDataset(config, 1), 0, config, len(model.chunks))
        compute_gradients(model, batches, config, layout)
    return float(tokens.metrics()["mtp_loss"])


@pytest.mark.parametrize("parallel", [{**TP2, **PP2}, {"context_parallel_size": 2}, {}])
def test_the_logged_loss_is_of_all_tokens(ranks: RankPools, parallel: dict[str, Any]) -> None:
    (expected,) = ranks(1).run(logged_loss, further())
    found = ranks(4).run(logged_loss, further(parallel=parallel))
    assert len(set(found)) == 1
    # Sums of some hundred losses in another order, in fp32 up to the last one.
    assert found[0] == pytest.approx(expected, rel=FP32)
    # Untrained: about that of a guess among the 64 tokens of the vocabulary, and not the zero
    # that unread sums would give.
    assert 3.0 < expected < 8.0
