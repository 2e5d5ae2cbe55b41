"""Features of the model train in every layout what they train on one process."""

from typing import Any

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.setup import _compile_extension
from tests.parallel.checkpoint_runs import continue_in_another_layout
from tests.parallel.forced_routing import pad_some, vary_norms
from tests.parallel.training_runs import (
    CP2,
    EP2,
    FULL,
    LATENT,
    LATENT_WIDTHS,
    PP2,
    STEPS,
    TP2,
    VANILLA,
    compare,
    merged,
    short,
)
from tests.refusals import config_error

# fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
FP32 = 1e-5
Sections = dict[str, dict[str, Any]]

EP4 = {"expert_model_parallel_size": 4}
WHOLE = {"use_distributed_optimizer": False}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CHUNKS = PP2 | {"virtual_pipeline_model_parallel_size": 2}
# The lane of router logits crosses stages.
STAGES_OF_THREE = PP2 | {"pipeline_model_parallel_layout": "Ett|tL"}


def again(*modules):
    """Computed again in the backward pass."""
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


DEDUPLICATED = {"dispatcher": "alltoall_dedup"}
ALL_GATHER = {"dispatcher": "allgather"}
Z_LOSS = {"z_loss_coeff": 1e-3}
SEQUENCES = {"balance_scope": "sequence", "capacity_factor": 0.8}
SHARED = {"shared_expert_ffn_hidden_size": 16}
# Two depths, and a weight at which their gradients show; a z-loss, so that megatron-core's tracker
# counts these layers too.
FURTHER = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.5}
COUNTED = {"model": FURTHER, "moe": {"z_loss_coeff": 0.01}}
# The first layer is dense, as DeepSeek's are.
DEEPSEEK = {"model": LATENT | {"num_layers": 3}, "moe": {"layer_freq": [0, 1, 1]}}
# Four groups of two experts: a rank of EP 2 has two of them, a rank of EP 4 one.
GROUPS = {
    "num_groups": 4,
    "group_topk": 2,
    "router_topk": 3,
    "num_zero_experts": 2,
    "selection_bias": True,
    "capacity_factor": 1.1,
}
ALL_HEADS = {"qk_layernorm": True, "qk_layernorm_scope": "all_heads"}
DOCUMENTS = {"data": {"reset_attention_mask": True}, "moe": Z_LOSS}


def documents(**sections):
    return merged(DOCUMENTS, sections)


# What the run of one process has too; of each layout its ranks and what it has besides.
FEATURES = {
    "further tokens": (
        COUNTED,
        {
            "tp2 ep2, layers again": (2, {"parallel": TP2 | EP2, "training": FULL}),
            "dp2 ep2, MoE layers again": (2, {"parallel": EP2, "training": again("moe")}),
            "cp2": (2, {"parallel": CP2}),
            # The embedding is on both stages, its gradient the sum of both.
            "tp2 pp2, whole optimizer": (4, {"parallel": TP2 | PP2 | WHOLE}),
        },
    ),
    # The balance loss is of a micro-batch.
    "further tokens, micro-batches of one": (
        COUNTED | {"training": {"micro_batch_size": 1}},
        {"pp2 ep2": (4, {"parallel": PP2 | EP2})},
    ),
    "further tokens, four layers": (
        COUNTED | {"model": FURTHER | {"num_layers": 4}},
        {
            "pp2 interleaved": (2, {"parallel": CHUNKS}),
            "pp2 uneven": (2, {"parallel": PP2 | {"pipeline_model_parallel_layout": "Ettt|tmmL"}}),
        },
    ),
    "one further token": (
        {"model": FURTHER | {"mtp_num_layers": 1, "qk_layernorm": True}},
        {"pp2": (2, {"parallel": PP2})},
    ),
    "further tokens, tied embeddings, latent attention": (
        {"model": FURTHER | LATENT | {"tie_embeddings": True}},
        {"tp2": (2, {"parallel": TP2})},
    ),
    **{
        f"further tokens, {name}": (sections, {"tp2 ep2": (2, {"parallel": TP2 | EP2})})
        for name, sections in {
            "no residual": {"model": FURTHER, "moe": {"gating_residual": False}},
            "dense": {"model": FURTHER | {"num_layers": 3}, "moe": {"layer_freq": [0, 1, 0]}},
            "vanilla": {"model": FURTHER, "moe": VANILLA},
        }.items()
    },
    "latent attention": (
        DEEPSEEK,
        {
            "tp2, up-projection again": (2, {"parallel": TP2, "training": again("mla_up_proj")}),
            "pp2, whole optimizer": (2, {"parallel": STAGES_OF_THREE | WHOLE}),
            "tp2 ep2 dp2, overlapped": (4, {"parallel": TP2 | EP2 | OVERLAPPED}),
            "tp2 cp2, layers again": (4, {"parallel": TP2 | CP2, "training": FULL}),
        },
    ),
    "latent attention, queries from the input": (
        merged(
            DEEPSEEK,
            {
                "model": {
                    "qk_layernorm": False,
                    "latent_attention": LATENT_WIDTHS | {"q_lora_rank": None},
                }
            },
        ),
        {"tp2": (2, {"parallel": TP2})},
    ),
    "biases, gated shared expert": (
        {
            "model": {"qkv_bias": True},
            "moe": {"shared_expert_ffn_hidden_size": 32, "shared_expert_gate": True},
        },
        {"pp2": (2, {"parallel": PP2}), "tp2 ep2 dp2": (4, {"parallel": TP2 | EP2})},
    ),
    "groups of experts": (
        {"moe": GROUPS},
        {
            "ep2": (2, {"parallel": EP2}),
            "tp2 ep4, once to each rank": (4, {"parallel": TP2 | EP4, "moe": DEDUPLICATED}),
            "pp2": (2, {"parallel": PP2}),
        },
    ),
    # Of three layers one both takes V from the first and hands it on.
    "shared constants": (
        {"model": {"num_layers": 3}, "moe": {"constants_shared": True}},
        {
            "tp2, recompute": (2, {"parallel": TP2, "training": FULL}),
            "dp2 overlapped": (2, {"parallel": OVERLAPPED}),
            # Each layer's backward pass adds its part by itself; megatron-core counts them in the
            # first step and reduces the gradient after as many in the others.
            "dp2 overlapped, recompute": (2, {"parallel": OVERLAPPED, "training": FULL}),
            "ep2 tp2, plain optimizer": (4, {"parallel": EP2 | TP2 | WHOLE}),
        },
    ),
    "shared expert": (
        {"moe": SHARED},
        {
            f"{ranks} ranks, {name}": (ranks, {"parallel": parallel, "moe": {"dispatcher": name}})
            for ranks, parallel in ((2, TP2 | EP2), (4, TP2 | EP4))
            for name in ("allgather", "alltoall", "alltoall_dedup")
        },
    ),
    # megatron-core's layer, which runs the shared expert before it gathers.
    "shared expert, vanilla": (
        {"moe": VANILLA | SHARED},
        {"tp2 ep2": (2, {"parallel": TP2 | EP2, "moe": ALL_GATHER})},
    ),
    "norms over all heads": (
        {"model": ALL_HEADS | {"num_query_groups": 2}},
        {
            "tp2, layers again": (2, {"parallel": TP2, "training": FULL}),
            "tp4, shared key heads": (
                4,
                {"parallel": TP2 | {"tensor_model_parallel_size": 4}},
            ),
            "pp2": (2, {"parallel": PP2}),
            "cp2": (2, {"parallel": CP2}),
            "tp2 ep2 dp2": (4, {"parallel": TP2 | EP2}),
        },
    ),
    # Adam's first step divides each gradient by its own size, so that one which is only rounding
    # moves a weight as far as any other: of four sequences first gradients are 2e-6 apart, and the
    # second step's balance loss 4e-5.
    "norms over all heads, one key head": (
        {
            "model": ALL_HEADS | {"num_query_groups": 1},
            "training": {"global_batch_size": 8},
        },
        {"tp2, a shared key head": (2, {"parallel": TP2})},
    ),
    "context parallelism": (
        {"model": {"hidden_size": 64, "num_query_groups": 2, "seq_length": 32}},
        {
            "cp2 ep2": (2, {"parallel": CP2 | EP2}),
            "cp2 tp2 ep4": (4, {"parallel": CP2 | TP2 | EP4}),
            "cp2 pp2": (4, {"parallel": CP2 | PP2}),
            "cp4 ep2": (4, {"parallel": EP2 | {"context_parallel_size": 4}}),
            "cp2, layers again": (2, {"parallel": CP2, "training": FULL}),
            "cp2, attention again": (2, {"parallel": CP2, "training": again("core_attn")}),
        },
    ),
    "documents": (
        documents(),
        {
            "cp2": (2, {"parallel": CP2}),
            "pp2 tp2, layers again": (4, {"parallel": PP2 | TP2, "training": FULL}),
            "ep2, attention again": (2, {"parallel": EP2, "training": again("core_attn")}),
        },
    ),
    "documents, capacity": (
        documents(moe={"capacity_factor": 1.0}),
        {"tp2 ep2": (2, {"parallel": TP2 | EP2})},
    ),
    "documents, sequences": (
        documents(moe={"balance_scope": "sequence", "capacity_factor": 0.9}),
        {"cp2 tp2": (4, {"parallel": CP2 | TP2})},
    ),
    "documents, four layers": (
        documents(model={"num_layers": 4}),
        {"pp2 vpp2": (2, {"parallel": CHUNKS})},
    ),
    "documents, latent attention": (
        documents(model=LATENT | {"qk_layernorm": False}),
        {"tp2": (2, {"parallel": TP2})},
    ),
    "documents, vanilla": (
        documents(moe=VANILLA | {"z_loss_coeff": None}),
        {"ep2": (2, {"parallel": EP2}), "pp2": (2, {"parallel": PP2})},
    ),
    "padding": (
        {"moe": Z_LOSS},
        {
            "dp2 ep2": (2, {"parallel": EP2}),
            "dp2 ep2 dedup": (2, {"parallel": EP2, "moe": DEDUPLICATED}),
        },
    ),
    "padding, shared expert": (
        {"moe": Z_LOSS | SHARED},
        {
            "tp2 ep2": (2, {"parallel": TP2 | EP2}),
            "tp2 ep2 allgather": (2, {"parallel": TP2 | EP2, "moe": ALL_GATHER}),
        },
    ),
    "padding, capacity": (
        {"moe": Z_LOSS | {"capacity_factor": 1.0}},
        {"cp2": (2, {"parallel": CP2})},
    ),
    "padding, sequences": (
        {"moe": Z_LOSS | SEQUENCES | {"balance_loss": "grouped"}},
        {"cp2 tp2": (4, {"parallel": CP2 | TP2})},
    ),
    "padding, z-loss": (
        {"moe": {"z_loss_coeff": 1e-2}},
        {"pp2 tp2": (4, {"parallel": PP2 | TP2})},
    ),
    # The mask moves over the halves of a sequence that context-parallel ranks hold, too.
    **{
        f"padding, further tokens, {name}": (
            {"moe": Z_LOSS | moe, "model": FURTHER},
            {"layout": (ranks, {"parallel": parallel})},
        )
        for name, ranks, parallel, moe in (
            ("tp2 ep2", 2, TP2 | EP2, {}),
            ("cp2 capacity", 2, CP2, {"capacity_factor": 1.0}),
            ("cp2 tp2 sequence", 4, CP2 | TP2, SEQUENCES),
            ("pp2 ep2", 4, PP2 | EP2, {"balance_scope": "sequence"}),
            ("no residual", 2, EP2, {"gating_residual": False}),
        )
    },
}


PREPARED = {"norms over all heads": vary_norms, "padding": pad_some}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("feature", "layout"),
    [(feature, layout) for feature, (_, layouts) in FEATURES.items() for layout in layouts],
)
def test_training_equals_one_process(trained, alone, feature, layout):
    both, layouts = FEATURES[feature]
    world_size, own = layouts[layout]
    prepare = PREPARED.get(feature.partition(",")[0])
    if "up-projection" in layout:
        # Here: it computes for 20 seconds, for which ranks should not wait.
        _compile_extension()
    run = trained(world_size, short(**merged(both, own)), STEPS, prepare)
    compare(run, alone(short(**both), prepare), FP32)


@pytest.mark.parametrize(
    ("feature", "without"),
    [
        ("groups of experts", {"moe": GROUPS | {"num_groups": 1, "group_topk": 1}}),
        ("padding", {"moe": Z_LOSS}),
        ("documents", {"moe": Z_LOSS}),
    ],
)
def test_the_feature_changes_the_model(alone, feature, without):
    """Otherwise layouts would have agreed on a model without it."""
    run = alone(short(**FEATURES[feature][0]), PREPARED.get(feature))
    assert run.losses != alone(short(**without)).losses


def test_further_layers_are_measured_as_the_decoders_next(alone):
    run = alone(short(**COUNTED))
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
    ("feature", "first", "second", "other", "refused"),
    [
        # Two stages have an embedding each, which is one tensor.
        ("further tokens", TP2, PP2, {"model": {"mtp_num_layers": 1}}, r"mtp_num_layers \(1\)"),
        (
            "latent attention",
            TP2,
            STAGES_OF_THREE,
            {"model": {"latent_attention": LATENT_WIDTHS | {"kv_lora_rank": 20}}},
            "latent_attention .*'kv_lora_rank': 20.*",
        ),
        (
            "shared constants",
            EP2,
            TP2,
            {"moe": {"constants_shared": False}},
            r"constants_shared \(false\)",
        ),
        (
            "norms over all heads",
            TP2,
            {},
            {"model": {"qk_layernorm_scope": "head"}},
            r"qk_layernorm_scope \('head'\)",
        ),
    ],
)
def test_checkpoint_of_another_layout(ranks, tmp_path, feature, first, second, other, refused):
    from moepp_megatron.training.checkpoint.compatible import check_compatible

    sections = FEATURES[feature][0]

    def raw(**more):
        return short(**merged(sections, more))

    start = continue_in_another_layout(ranks, tmp_path, raw, first, second)
    with config_error(rf"{refused} must be that of"):
        check_compatible(start, parse_config(raw(**other)))
