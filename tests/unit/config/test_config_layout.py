"""The rank grid against megatron-core's, pipeline stages, parameter counts against hand numbers."""

import pytest

from moepp_megatron.config import (
    Layout,
    count_parameters,
    load_config,
    stage_layers,
    with_overrides,
)
from tests import ROOT

CONFIGS = ROOT / "configs"
PARALLEL = "parallel.{}_parallel_size={}"


def layout_overrides(tp, pp, cp, ep, etp):
    return [
        PARALLEL.format("tensor_model", tp),
        PARALLEL.format("pipeline_model", pp),
        PARALLEL.format("context", cp),
        PARALLEL.format("expert_model", ep),
        PARALLEL.format("expert_tensor", etp),
        f"parallel.sequence_parallel={'true' if tp > 1 else 'false'}",
    ]


def test_degrees_and_microbatches(minimal):
    layout = Layout.from_config(load_config(minimal, layout_overrides(2, 2, 1, 4, 1)), 16)
    assert layout == Layout(
        world_size=16, tp=2, pp=2, vpp=1, cp=1, dp=4, ep=4, etp=1, edp=2, num_microbatches=2
    )


GRIDS = [
    (8, 1, 1, 1, 8, 1),
    (8, 2, 1, 1, 4, 1),
    (8, 2, 2, 2, 2, 1),
    (16, 2, 2, 2, 2, 2),
    (16, 4, 1, 2, 8, 1),
    (16, 1, 4, 1, 2, 2),
]


@pytest.mark.parametrize(("world_size", "tp", "pp", "cp", "ep", "etp"), GRIDS)
def test_coordinates_are_those_of_megatron(minimal, world_size, tp, pp, cp, ep, etp):
    """Every group that megatron-core would form is the ranks that differ in one coordinate."""
    from megatron.core.parallel_state import RankGenerator

    overrides = [*layout_overrides(tp, pp, cp, ep, etp), "training.global_batch_size=64"]
    layout = Layout.from_config(load_config(minimal, overrides), world_size)
    order = "tp-cp-ep-dp-pp"  # the default of initialize_model_parallel
    dense = RankGenerator(tp=tp, ep=1, dp=layout.dp, pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order=order)
    grid = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for generator, names in (
        (dense, {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp"}),
        (expert, {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}),
    ):
        for token, name in names.items():
            for group in generator.get_ranks(token):
                assert [getattr(grid[rank], name) for rank in group] == list(range(len(group)))
                others = [other for other in names.values() if other != name]
                assert len({tuple(getattr(grid[r], o) for o in others) for r in group}) == 1


def test_stages_without_layout(minimal):
    assert stage_layers(load_config(minimal)) == (((0, 1, 2, 3),),)
    pp2 = ["parallel.pipeline_model_parallel_size=2"]
    assert stage_layers(load_config(minimal, pp2)) == (((0, 1),), ((2, 3),))
    vpp2 = [*pp2, "parallel.virtual_pipeline_model_parallel_size=2"]
    assert stage_layers(load_config(minimal, vpp2)) == (((0,), (2,)), ((1,), (3,)))


@pytest.mark.parametrize(
    ("text", "pp", "layers"),
    [
        ("Et|tt|t|L", 4, 4),
        ("Et|tt|t|L", 2, 4),
        ("E,(t|)*3,tL", 2, 4),
        ("Et*3|(tt|)*2,L", 4, 7),
        ("Ett|ttL", 2, 4),
    ],
)
def test_layout_string_is_read_as_megatron_reads_it(minimal, text, pp, layers):
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    config = load_config(
        minimal,
        [
            f"model.num_layers={layers}",
            f"parallel.pipeline_model_parallel_size={pp}",
            f"parallel.pipeline_model_parallel_layout={text}",
        ],
    )
    theirs = PipelineParallelLayerLayout(text, pp)
    theirs.validate_layer_layout(num_layers=layers, mtp_num_layers=0)
    counts = [
        [[kind.name for kind in chunk].count("decoder") for chunk in rank] for rank in theirs.layout
    ]
    ours = stage_layers(config)
    assert [[len(chunk) for chunk in rank] for rank in ours] == counts
    assert sorted(layer for rank in ours for chunk in rank for layer in chunk) == list(
        range(layers)
    )


def tiny(minimal, *overrides):
    """Two layers, width 8, FFN 16, 2 heads of 4, vocabulary 10, 2 + 3 experts."""
    return load_config(
        minimal,
        [
            "model.num_layers=2",
            "model.hidden_size=8",
            "model.ffn_hidden_size=16",
            "model.num_attention_heads=2",
            "model.vocab_size=10",
            "moe.num_ffn_experts=2",
            "moe.num_constant_experts=1",
            *overrides,
        ],
    )


@pytest.fixture
def counted(minimal):
    return lambda *overrides: count_parameters(tiny(minimal, *overrides))


def test_parameters_by_hand(counted):
    counts = counted()
    assert counts.embedding == 2 * 10 * 8
    assert counts.attention == 2 * (4 * 8 * 8)
    assert counts.norms == 5 * 8
    assert counts.dense_ffn == 0
    assert counts.per_ffn_expert == 3 * 8 * 16
    assert counts.ffn_experts == 2 * 2 * 384
    assert counts.router == 2 * 5 * 8 + 5 * 5  # two gates, one residual
    assert counts.zero_computation_experts == 2 * (8 + 2 * 8)
    assert counts.total == 160 + 512 + 40 + 1536 + 105 + 48
    # phi = 1.5 / 4.5 = 1/3 of 2 selections: 2/3 FFN experts and 4/3 of 3 others, a layer
    assert counts.active == round(160 + 512 + 40 + 105 + 2 * (2 / 3 * 384) + 48 * (4 / 3) / 3)


def test_parameters_of_the_variants(counted):
    plain = counted()
    assert counted("model.tie_embeddings=true").embedding == 80
    grouped = counted("model.num_query_groups=1")
    assert grouped.attention == 2 * (2 * 8 * 8 + 2 * 4 * 8)
    wide = counted("model.kv_channels=6")
    assert wide.attention == 2 * (4 * 12 * 8)
    normed = counted("model.qk_layernorm=true")
    assert normed.attention == plain.attention + 2 * 2 * 4
    spanning = ["model.qk_layernorm=true", "model.qk_layernorm_scope=all_heads"]
    spans = counted("model.num_query_groups=1", *spanning)
    assert spans.attention == grouped.attention + 2 * (8 + 4)
    assert counted("moe.gating_residual=false").router == 2 * 5 * 8
    two_layer = counted("moe.two_layer_gate=true")
    assert two_layer.router == 2 * (40 * 8 + 5 * 40) + 25
    one_v = counted("moe.constants_shared=true")
    assert one_v.zero_computation_experts == plain.zero_computation_experts - 8
    assert one_v.active == plain.active
    shared = counted("moe.shared_expert_ffn_hidden_size=4")
    assert shared.shared_experts == 2 * 3 * 8 * 4
    gated = counted("moe.shared_expert_ffn_hidden_size=4", "moe.shared_expert_gate=true")
    assert gated.shared_experts == 2 * (3 * 8 * 4 + 8)
    biased = counted("model.num_query_groups=1", "model.qkv_bias=true")
    assert biased.attention == grouped.attention + 2 * (8 + 2 * 4)
    narrow = counted("moe.ffn_hidden_size=10")
    assert narrow.per_ffn_expert == 3 * 8 * 10
    mixed = counted("moe.layer_freq=2")
    assert mixed.dense_ffn == 3 * 8 * 16
    assert mixed.ffn_experts == 2 * 384
    assert mixed.router == 5 * 8  # a single MoE layer has no residual
    further = counted("model.mtp_num_layers=2")
    assert further.mtp_parameters == 2 * (3 * 8 + 8 * 16)
    assert further.attention == 2 * plain.attention
    assert further.router == plain.router + 2 * (5 * 8 + 5 * 5)
    assert further.ffn_experts == 2 * plain.ffn_experts
    assert further.embedding == plain.embedding
    dense = counted("model.mtp_num_layers=1", "moe.layer_freq=2")
    assert dense.dense_ffn == 2 * mixed.dense_ffn  # of the last decoder layer's kind


def test_vanilla_tokens_meet_k_experts(minimal):
    config = with_overrides(
        tiny(minimal),
        [
            "moe.num_zero_experts=0",
            "moe.num_copy_experts=0",
            "moe.num_constant_experts=0",
            "moe.gating_residual=false",
            "moe.router_topk=1",
        ],
    )
    counts = count_parameters(config)
    assert config.moe.is_vanilla
    assert config.moe.ffn_share == 1.0
    assert counts.active == counts.total - 2 * 384
