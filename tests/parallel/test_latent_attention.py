"""Latent attention trains in every layout what it trains on one process; its checkpoints too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import ConfigError, parse_config
from moepp_megatron.training.setup import compile_extension
from tests.parallel.checkpoint_runs import continue_in_another_layout
from tests.parallel.ranks import RankPools
from tests.parallel.test_expert_overlap import STAGES, both
from tests.parallel.training_runs import CP2, EP2, FULL, PP2, TP2, Run, compare, short, train

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
WIDTHS = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
MODEL: dict[str, Any] = {"num_query_groups": None, "qk_layernorm": True, "latent_attention": WIDTHS}
UP_PROJECTION = {"recompute_granularity": "selective", "recompute_modules": ["mla_up_proj"]}
# The lane of router logits crosses stages.
STAGES_OF_THREE = {**PP2, "pipeline_model_parallel_layout": "Ett|tL"}
Sections = dict[str, dict[str, Any]]
LAYOUTS: dict[str, tuple[int, Sections]] = {
    "tp2, up-projection again": (2, {"parallel": TP2, "training": UP_PROJECTION}),
    "pp2, whole optimizer": (
        2,
        {"parallel": {**STAGES_OF_THREE, "use_distributed_optimizer": False}},
    ),
    "tp2 ep2 dp2, overlapped": (
        4,
        {"parallel": {**EP2, **TP2, "overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
    "tp2 cp2, layers again": (4, {"parallel": {**TP2, **CP2}, "training": FULL}),
}


def latent(model: dict[str, Any] = MODEL, **sections: dict[str, Any]) -> Sections:
    """Settings of a run whose first layer is dense, as DeepSeek's are."""
    moe = {"num_ffn_experts": 8, "layer_freq": [0, 1, 1]}
    return short(model={"num_layers": 3, **model}, moe=moe, **sections)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(trained, alone: Callable[..., Run], layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    if sections.get("training") is UP_PROJECTION:
        # Here: 20 seconds of computing, alone, are not what the ranks have their time for.
        compile_extension()
    run = trained(world_size, latent(**sections))
    compare(run, alone(latent()), FP32)


def test_queries_from_the_input(trained, alone: Callable[..., Run]) -> None:
    model = MODEL | {"qk_layernorm": False, "latent_attention": WIDTHS | {"q_lora_rank": None}}
    run = trained(2, latent(model, parallel=TP2))
    compare(run, alone(latent(model)), FP32)


@pytest.mark.parametrize("parallel", [EP2, STAGES], ids=["one stage", "interleaved"])
def test_combined_schedule(ranks: RankPools, parallel: dict[str, Any]) -> None:
    run, reference = both(
        ranks, 4 if parallel is STAGES else 2, train, model=MODEL, parallel=parallel
    )
    compare(run, reference, 0.0)


def test_checkpoint_of_another_layout(ranks: RankPools, tmp_path: Path) -> None:
    from moepp_megatron.training.checkpoint.compatible import check_compatible

    start = continue_in_another_layout(ranks, tmp_path, latent, TP2, STAGES_OF_THREE)
    wider = MODEL | {"latent_attention": WIDTHS | {"kv_lora_rank": 20}}
    with pytest.raises(ConfigError, match=r"model\.latent_attention .*'kv_lora_rank': 20"):
        check_compatible(start, parse_config(latent(wider)))
