"""Copies of a parameter that come apart are found, and named with rank and step."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankError, RankPools
from tests.parallel.training_runs import EP2, PP2, TP2, SyntheticDataset, begin_training, settings

pytestmark = pytest.mark.parallel


HEALTHY: dict[str, dict[str, Any]] = {
    "ep2": {"parallel": EP2},
    "tp2": {"parallel": TP2},
    "cp2": {"parallel": {"context_parallel_size": 2}},
    "pp2 tied embeddings": {"parallel": PP2, "model": {"tie_embeddings": True}},
    "dp2 bf16": {"precision": {"dtype": "bf16"}},
    "dp2 late gather": {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
}
# Layout; part of a parameter's name on rank 1 (with PP2 a last stage), one bit of which is flipped.
FLIPPED: dict[str, tuple[dict[str, Any], str]] = {
    "dense weight over dp": ({}, "linear_qkv.weight"),
    "expert over expert dp": ({}, "local_experts.3.linear_fc1.weight"),
    "router over dp, with ep": ({"parallel": EP2}, "router.weight"),
    "norm over tp": ({"parallel": TP2}, "input_layernorm.weight"),
    "gating residual over tp": ({"parallel": TP2}, "router.residual_weight"),
    "constant experts over tp": ({"parallel": TP2}, "zero_computation"),
    "weight shard over cp": (
        {"parallel": {"context_parallel_size": 2}},
        "self_attention.linear_proj.weight",
    ),
    "tied embedding over pp": (
        {"parallel": PP2, "model": {"tie_embeddings": True}},
        "output_layer.weight",
    ),
}


def train_and_check(raw: dict[str, Any], flipped: str | None = None) -> str:
    """Two steps and a comparison; with `flipped`, rank 1 loses a bit before it.

    Returns:
        The name of the parameter that was changed, on rank 1.
    """
    import torch.distributed as dist

    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.resilience.supervisor import Supervisor
    from moepp_megatron.training.step import training_step

    config, layout, model = begin_training(raw)
    supervisor = Supervisor(config, model)
    batches = rank_batches(SyntheticDataset(config, 2), 0, config, len(model.chunks))
    name = ""
    for step in (1, 2):
        training_step(model, batches, config, layout)
        if step == 2 and flipped is not None and dist.get_rank() == 1:
            name = _flip_one_bit(model.models[0], flipped)
        supervisor.end_step(step)
    return name


def _flip_one_bit(model: Any, part: str) -> str:
    import torch

    names = [name for name, _ in model.named_parameters() if part in name]
    assert names, f"no parameter named like {part}"
    parameter = model.get_parameter(names[-1])
    # The lowest bit of the mantissa, of an element in the middle.
    words = parameter.data.view(-1).view(torch.int32)
    words[words.numel() // 2] ^= 1
    return names[-1]


def _raw(sections: dict[str, Any]) -> dict[str, Any]:
    watch = {"divergence_interval": 1, "hang_timeout_s": 0.0, "straggler_interval": 0}
    return settings(**{**sections, "resilience": watch})


@pytest.mark.parametrize("layout", HEALTHY)
def test_healthy_copies_agree(ranks: RankPools, layout: str) -> None:
    ranks(2).run(train_and_check, _raw(HEALTHY[layout]))


@pytest.mark.parametrize("case", FLIPPED)
def test_one_flipped_bit_ends_every_rank(ranks: RankPools, case: str) -> None:
    sections, part = FLIPPED[case]
    with pytest.raises(RankError, match="SilentDivergenceError") as caught:
        ranks(2).run(train_and_check, _raw(sections), part)
    reasons = caught.value.reasons
    assert sorted(reasons) == [0, 1], "both ranks end, not only those that compared"
    for reason in reasons.values():
        lines = [line for line in reason.splitlines() if line.startswith("  step 2: ")]
        assert len(lines) == 1, f"one parameter was changed: {lines}"
        assert part in lines[0] or "tied embedding" in lines[0]
        assert "rank 0 " in lines[0]
        assert "rank 1 " in lines[0]
