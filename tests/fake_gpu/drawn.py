"""Configurations that nobody chose: for each seed one value of every axis, redrawn until legal."""

import random
from math import lcm

from moepp_megatron.config import ConfigError, Layout, load_config
from tests.fake_gpu import cases

_LATENT = (
    "model.latent_attention={q_lora_rank: 384, kv_lora_rank: 128, qk_head_dim: 64, "
    "qk_pos_emb_head_dim: 32, v_head_dim: 64}"
)
_OVERLAP = "parallel.overlap_moe_expert_parallel_comm=true"
_SELECTIVE = "training.recompute_granularity=selective training.recompute_modules="
_OFFLOADING = (
    "megatron.fine_grained_activation_offloading=true megatron.min_offloaded_tensor_size=1 "
    "megatron.offload_modules="
)
# The first value leaves the setting as it is, and is drawn as often as the others together.
_AXES = (
    (
        "",
        "precision.fp8=hybrid precision.fp8_recipe=delayed",
        "precision.fp8=hybrid precision.fp8_recipe=tensorwise",
        "precision.fp8=hybrid precision.fp8_recipe=blockwise",
        "precision.dtype=fp32",
    ),
    ("", "precision.fp8_param=true", "precision.first_last_layers_bf16=true"),
    (
        "",
        "moe.dispatcher=alltoall_dedup",
        "moe.dispatcher=allgather",
        "moe.dispatcher=flex moe.flex_backend=deepep",
        "moe.dispatcher=flex moe.flex_backend=hybridep",
    ),
    (
        "",
        f"{_SELECTIVE}[moe]",
        f"{_SELECTIVE}[core_attn]",
        f"{_SELECTIVE}[layernorm,moe_act]",
        f"{_SELECTIVE}[mla_up_proj]",
        f"{_SELECTIVE}[shared_experts]",
        "training.recompute_granularity=full training.recompute_method=uniform "
        "training.recompute_num_layers=1",
        "training.recompute_granularity=full training.recompute_method=block "
        "training.recompute_num_layers=1",
    ),
    ("", "training.cuda_graphs=[attn]", "training.cuda_graphs=[moe_router]"),
    ("", _OVERLAP, f"{_OVERLAP} parallel.delay_wgrad_compute=true"),
    (
        "",
        "parallel.use_distributed_optimizer=false parallel.overlap_param_gather=false",
        "parallel.overlap_grad_reduce=false parallel.overlap_param_gather=false",
    ),
    ("", "model.mtp_num_layers=1", "data.reset_attention_mask=true", "model.tie_embeddings=true"),
    (
        "",
        _LATENT,
        "model.num_query_groups=4",
        "model.qk_layernorm=true",
        "model.qk_layernorm=true model.qk_layernorm_scope=all_heads",
        "model.qkv_bias=true",
    ),
    (
        "",
        "moe.shared_expert_ffn_hidden_size=256",
        "moe.shared_expert_ffn_hidden_size=256 moe.shared_expert_gate=true",
    ),
    (
        "",
        "moe.num_zero_experts=0",
        "moe.num_copy_experts=0",
        "moe.num_constant_experts=0",
        "moe.num_constant_experts=6",
        " ".join(cases.VANILLA),
    ),
    ("", "moe.gating_residual=false", "moe.two_layer_gate=true", "moe.constants_shared=true"),
    (
        "",
        "moe.capacity_factor=1.25",
        "moe.num_groups=4 moe.group_topk=2",
        "moe.score_function=sigmoid moe.selection_bias=true moe.bias_update_rate=0.001",
    ),
    (
        "",
        "moe.balance_scope=sequence",
        "moe.balance_coeff=0.0",
        "moe.z_loss_coeff=0.001",
        "moe.input_jitter_eps=0.01",
        "moe.budget.target_ffn_per_token=1.0",
        "moe.balance_loss=grouped",
    ),
    ("", "moe.router_topk=4", "moe.layer_freq=2", "moe.fused=false"),
    ("", "precision.cross_entropy=native", "precision.cross_entropy=unfused"),
    (
        "",
        "optimizer.exp_avg_dtype=bf16 optimizer.exp_avg_sq_dtype=bf16",
        "optimizer.kind=muon",
        "optimizer.kind=lion",
    ),
    ("", "training.deterministic=true", "moe.cutlass_grouped_gemm=true", "moe.tau=0.25"),
)
# Drawn last, so that they come on top of what was drawn before there were any.
_OF_MEGATRON = (
    (
        "",
        "megatron.fused_residual_rmsnorm=true",
        "megatron.fused_single_qkv_rope=true",
        "megatron.moe_router_fusion=true",
        "megatron.moe_permute_fusion_into_hybridep=true",
        "megatron.high_priority_a2a_comm_stream=true "
        "megatron.ep_overlap_early_attn_memory_release=true",
    ),
    (
        "",
        f"{_OFFLOADING}[core_attn,attn_proj]",
        f"{_OFFLOADING}[expert_fc1,moe_act]",
        f"{_OFFLOADING}[qkv_linear,mlp_norm,moe_act]",
    ),
)
_PARTS = ([], ["evaluation"], ["save"], ["guard", "health"])


def drawn(seed):
    """A layout, then a value of each axis in turn, those that are legal with what is there."""
    generator = random.Random(seed)
    layout, world = _layout(generator)
    while not _is_legal(layout, world):
        layout, world = _layout(generator)
    parts = generator.choice(_PARTS)
    overrides = [*layout, *(cases.WATCHED if "guard" in parts else ())]
    _add(overrides, generator.sample(_AXES, len(_AXES)), world, generator)
    # The first rank checks what all ranks write, and there are no others; its save is a lone one's.
    rank = generator.randrange(world) if "save" not in parts else world - 1
    _add(overrides, _OF_MEGATRON, world, generator)
    fields = {"parts": parts, "rank": rank}
    return {"config": cases.SMALLEST, "overrides": overrides, "world_size": world, **fields}


def _add(overrides, axes, world, generator):
    for first, *others in axes:
        value = first if generator.random() < 0.4 else generator.choice(others)
        # A section in braces is one setting.
        more = [value] if "{" in value else value.split()
        if more and _is_legal([*overrides, *more], world):
            overrides += more


def _is_legal(overrides, world):
    try:
        config = load_config(
            cases.ROOT / cases.SMALLEST, ["data.path=none", "run.dir=none", *overrides]
        )
        Layout.from_config(config, world)
    except ConfigError:
        return False
    return True


def _layout(generator):
    """Settings and ranks; four layers or eight, and as many micro-batches as fill the pipeline."""
    tp, cp, pp, etp, ep = (
        generator.choice(sizes)
        for sizes in ((1, 1, 2), (1, 1, 1, 2), (1, 1, 2), (1, 1, 2), (1, 2, 4))
    )
    chunks = generator.choice((None, None, 2)) if pp > 1 else None
    world = pp * lcm(tp * cp, ep * etp) * generator.choice((1, 2))
    sizes = {
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "pipeline_model_parallel_size": pp,
        "expert_tensor_parallel_size": etp,
        "expert_model_parallel_size": ep,
        "virtual_pipeline_model_parallel_size": "null" if chunks is None else chunks,
    }
    settings = [f"parallel.{key}={value}" for key, value in sizes.items()]
    settings += [
        f"parallel.sequence_parallel={str(tp > 1).lower()}",
        f"model.num_layers={2 * pp * (chunks or 1)}",
        "training.micro_batch_size=1",
        f"training.global_batch_size={2 * world // (tp * cp)}",
    ]
    return settings, world
