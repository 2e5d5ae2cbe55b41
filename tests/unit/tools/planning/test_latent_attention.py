"""Latent attention in plans: sizes of a rank, built ranks, the fullest stage."""

import pytest

from moepp_megatron.config import Layout, count_parameters, load_config, parse_config
from moepp_megatron.config.flops import forward_flops_per_token
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.memory import _memory_of, fullest_rank, rank_memory
from moepp_megatron.tools.planning.pipeline import even_stages
from moepp_megatron.tools.planning.workload import LatentAttention, Workload, _attention_of
from tests import ROOT
from tests.unit.tools.planning.rank_builds import WORLD, SplitCompressions, build
from tests.unit.tools.planning.test_built_rank import settings

DEEPSEEK = ROOT / "configs/models/deepseek_v3_256_64.yaml"
WIDTHS = {
    "q_lora_rank": 24,
    "kv_lora_rank": 28,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
MODELS = {
    "compressed": {"qk_layernorm": True, "latent_attention": WIDTHS},
    "queries from the input": {"latent_attention": WIDTHS | {"q_lora_rank": None}},
}
LAYOUT = {
    "tensor_model_parallel_size": 4,
    "sequence_parallel": True,
    "pipeline_model_parallel_size": 4,
    "expert_model_parallel_size": 8,
}


def test_deepseek_is_what_was_published():
    """arXiv 2412.19437: 671B parameters, of which a token meets 37B with all of its experts."""
    config = load_config(DEEPSEEK)
    counts = count_parameters(config)
    assert counts.total == pytest.approx(671e9, rel=1e-3)
    per_layer = counts.per_ffn_expert
    taken = counts.active + 58 * per_layer * 8 * (1 - config.moe.ffn_share)
    assert taken == pytest.approx(37e9, rel=0.02)
    assert _attention_of(config) == LatentAttention(128, 1536, 512, 128, 64, 128)


@pytest.mark.parametrize("kind", MODELS)
def test_sizes_agree_with_the_configuration(kind):
    config = parse_config(settings({}, model=MODELS[kind]))
    attention = _attention_of(config)
    hidden, layers = config.model.hidden_size, config.model.num_layers
    weights = sum(one.outputs * one.inputs for one in attention.matmuls(hidden, 1))
    counted = count_parameters(config).attention
    assert layers * (weights + attention.norm_parameters()) == counted
    scores = config.model.seq_length * attention.heads * (attention.qk_dim + attention.v_dim)
    # Twice the heads in the same sizes: what is left of the FLOP has no attention in it.
    wider = parse_config(settings({}, model=MODELS[kind] | {"num_attention_heads": 16}))
    more = forward_flops_per_token(wider, 1.0) - forward_flops_per_token(config, 1.0)
    doubled = sum(one.outputs * one.inputs for one in _attention_of(wider).matmuls(hidden, 1))
    assert more == layers * 2 * (doubled - weights + scores)


@pytest.mark.parametrize(("kind", "rank"), [("compressed", 700), ("queries from the input", 0)])
def test_ranks_are_what_the_plan_says(elsewhere, kind, rank):
    raw = settings(LAYOUT, model=MODELS[kind], moe={"layer_freq": [0, *[1] * 15]})
    [(built, differences)] = elsewhere.submit(build, raw, [rank]).result()
    assert differences == {}
    # With Transformer Engine a rank holds the compressions whole, which the plan counts.
    config = parse_config(raw)
    layout = Layout.from_config(config, WORLD)
    attention = _attention_of(config)
    assert isinstance(attention, LatentAttention)
    split = SplitCompressions(**vars(attention))
    whole, parts = (
        sum(matmul.outputs * matmul.inputs for matmul in one.matmuls(64, 4))
        for one in (attention, split)
    )
    said = rank_memory(config, layout, layout.coordinates(rank).pp).dense
    assert said - built.dense == 4 * (whole - parts) > 0


def test_the_fullest_stage_may_be_none_of_the_first_two():
    """DeepSeek's first layers are dense: the experts' memory begins in the third of 32 stages."""
    load = Workload.from_config(load_config(DEEPSEEK))
    for pp, vpp in ((32, 1), (16, 1), (4, 4), (1, 1)):
        grid = Grid(1024, tp=2, pp=pp, vpp=vpp, ep=8)
        stages = even_stages(load.layers, pp, vpp)
        most = max(_memory_of(load, grid, stages, rank).total for rank in range(pp))
        # The first MoE layer has no gating residual: E x E weights and their state.
        residual = 18 * load.experts.num_experts**2
        assert fullest_rank(load, grid, stages).total == pytest.approx(most, abs=residual)
