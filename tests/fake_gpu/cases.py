"""The cases that are played: shipped configurations at full width, and layouts and features."""

from pathlib import Path

from moepp_megatron.config import Layout, load_config
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.memory import rank_memory
from moepp_megatron.tools.planning.parts import Layer, layer_parts
from moepp_megatron.tools.planning.workload import Workload

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "configs/models").glob("[a-z]*.yaml"))
PLANNED = sorted((ROOT / "configs/h100").glob("*.yaml"))
SMALLEST = "configs/models/moepp_0.6b_8_4.yaml"


def _loaded(path, *changes):
    return load_config(path, ["data.path=none", "run.dir=none", *changes])


def ranks_of(path):
    """Ranks that a shipped configuration is meant for; the fewest of its layout where none says."""
    if path in PLANNED:
        return int(path.stem.rpartition("_")[2])
    parallel = _loaded(path).parallel
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    dense = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return parallel.pipeline_model_parallel_size * max(ranks, dense)


def needs_engine(path):
    """True if a configuration needs Transformer Engine: for FP8, or for what it recomputes."""
    config = _loaded(path)
    training = config.training
    is_selective = training.recompute_granularity == "selective"
    recomputes = is_selective and "moe_act" in training.recompute_modules
    return config.precision.fp8 is not None or recomputes


def experts_of_a_rank(path):
    """FFN experts that a rank of a shipped configuration has."""
    config = _loaded(path)
    return config.moe.num_ffn_experts // config.parallel.expert_model_parallel_size


def stage_layers_of(path):
    """Layers of a pipeline stage; None where stages or layers differ from each other."""
    config = _loaded(path)
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.pipeline_model_parallel_layout or not isinstance(config.moe.layer_freq, int):
        return None
    return config.model.num_layers // stages


def whole(path, *changes, layers=None):
    """A shipped configuration at full width, on its fullest rank; and the estimate of all of it.

    As many micro-batches as fill the pipeline: further ones take no more memory. The combined
    schedule has one more at work.

    Args:
        path: Its file.
        *changes: Settings over it.
        layers: Layers of each pipeline stage; all of them where None.
    """
    config, world = _loaded(path, *changes), ranks_of(path)
    layout = Layout.from_config(config, world)
    stages = [rank_memory(config, layout, stage) for stage in range(layout.pp)]
    fullest = max(range(layout.pp), key=lambda stage: stages[stage].total)
    size = config.training.micro_batch_size
    count = layout.pp * (1 + config.parallel.overlap_moe_expert_parallel_comm)
    overrides = [
        *changes,
        f"model.num_layers={layers * layout.pp if layers else config.model.num_layers}",
        f"training.micro_batch_size={size}",
        f"training.global_batch_size={count * size * layout.dp}",
    ]
    case = {
        "config": str(path.relative_to(ROOT)),
        "overrides": overrides,
        "world_size": world,
        "rank": fullest * (world // layout.pp),
    }
    return case, stages[fullest]


def shipped(path, layers=2, *changes):
    """A shipped configuration on as many ranks as it is meant for, `layers` a pipeline chunk."""
    config, world = _loaded(path), ranks_of(path)
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
    overrides = [
        *changes,
        f"model.num_layers={layers * chunks}",
        f"training.global_batch_size={2 * world}",
        "parallel.pipeline_model_parallel_layout=null",
    ]
    if not isinstance(config.moe.layer_freq, int):
        # As many dense layers at the start as fit.
        overrides.append(f"moe.layer_freq={[0] + [1] * (layers * chunks - 1)}")
    return {"config": str(path.relative_to(ROOT)), "overrides": overrides, "world_size": world}


def planned_launches(path, *changes):
    """Kernels that the planner counts for an MoE layer and micro-batch, forward and backward."""
    config = _loaded(path, *changes)
    grid = Grid.from_config(config, ranks_of(path))
    layer = Layer(is_moe=True, rows=1.0, has_residual=config.moe.gating_residual)
    parts = list(layer_parts(Workload.from_config(config), grid, layer))
    return sum(part.forward.kernels + part.backward.kernels for part in parts)


def smallest(*overrides, world_size=1, sequences=0, **fields):
    """The smallest of the paper's models; as many sequences a step as ranks unless given."""
    batch = f"training.global_batch_size={sequences or world_size}"
    return {
        "config": SMALLEST,
        "overrides": [batch, *overrides],
        "world_size": world_size,
        **fields,
    }


VANILLA = (
    "moe.num_zero_experts=0",
    "moe.num_copy_experts=0",
    "moe.num_constant_experts=0",
    "moe.gating_residual=false",
    "moe.balance_scope=microbatch",
)
_TWO_EXPERT_RANKS = "parallel.expert_model_parallel_size=2"
_STAGES = "parallel.pipeline_model_parallel_size=2"
WATCHED = ["observe.health_interval=1"]
_TENSOR_AND_CONTEXT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.context_parallel_size=2",
]
# Without Transformer Engine. A step has one micro-batch, two on one rank, in
# pipelines and in the combined schedule.
LOCAL = {
    "one rank": smallest(sequences=2),
    "guards, budget, health, evaluation, save": smallest(
        *WATCHED,
        "moe.budget.target_ffn_per_token=1.0",
        parts=["guard", "health", "evaluation", "save"],
    ),
    "capacity, context parallel": smallest(
        "moe.capacity_factor=1.25", "parallel.context_parallel_size=2", world_size=2, sequences=1
    ),
    "first stage, expert parallel": smallest(_STAGES, _TWO_EXPERT_RANKS, world_size=4),
    "last stage, expert parallel, recompute": smallest(
        _STAGES,
        _TWO_EXPERT_RANKS,
        "training.recompute_granularity=full",
        "training.recompute_method=uniform",
        "training.recompute_num_layers=1",
        world_size=4,
        rank=2,
    ),
    "tensor, expert tensor and context parallel": smallest(
        *_TENSOR_AND_CONTEXT, "parallel.expert_tensor_parallel_size=2", world_size=4, sequences=1
    ),
    "all-gather": smallest(_TWO_EXPERT_RANKS, "moe.dispatcher=allgather", world_size=2),
    "deduplicated": smallest(_TWO_EXPERT_RANKS, "moe.dispatcher=alltoall_dedup", world_size=2),
    "static rows": smallest("moe.static_rows=1.3"),
    "static rows, expert parallel": smallest(
        _TWO_EXPERT_RANKS, "moe.static_rows=1.3", world_size=2
    ),
    "static rows, graphs": smallest("moe.static_rows=1.3", "training.cuda_graphs=[attn,moe]"),
    "static rows, graphs, expert parallel": smallest(
        _TWO_EXPERT_RANKS,
        "moe.static_rows=1.3",
        "training.cuda_graphs=[attn,moe]",
        "moe.shared_expert_ffn_hidden_size=256",
        world_size=2,
    ),
    "DeepEP": smallest(_TWO_EXPERT_RANKS, "moe.dispatcher=flex", world_size=2),
    "HybridEP": smallest(
        _TWO_EXPERT_RANKS, "moe.dispatcher=flex", "moe.flex_backend=hybridep", world_size=2
    ),
    "HybridEP, a part of a chunk": smallest(
        _TWO_EXPERT_RANKS,
        "moe.dispatcher=flex",
        "moe.flex_backend=hybridep",
        "model.seq_length=1040",
        world_size=2,
    ),
    "graphs": smallest("training.cuda_graphs=[attn,moe_router]"),
    "vanilla": smallest(*VANILLA),
}
_FP8 = "precision.fp8=hybrid"
_SELECTIVE = "training.recompute_granularity=selective"
_FLEX = "moe.dispatcher=flex"
_OFFLOADING = "megatron.fine_grained_activation_offloading=true"
_OFFLOADED = "megatron.offload_modules=[qkv_linear,core_attn,attn_proj,mlp_norm,expert_fc1,moe_act]"


def _fp8(recipe, *overrides, **fields):
    return smallest(_FP8, f"precision.fp8_recipe={recipe}", *overrides, **fields)


# What a configuration can name, each by itself or with what it meets in Transformer Engine.
ENGINE = {
    **{name: case for name, case in LOCAL.items() if name != "HybridEP, a part of a chunk"},
    "FP8, delayed": _fp8("delayed"),
    "FP8, delayed, weights": _fp8("delayed", "precision.fp8_param=true"),
    "FP8, tensorwise, ends in bf16": _fp8(
        "tensorwise", "precision.first_last_layers_bf16=true", "model.num_layers=3"
    ),
    "FP8, tensorwise, weights": _fp8("tensorwise", "precision.fp8_param=true", parts=["save"]),
    "FP8, blockwise, expert parallel": _fp8("blockwise", _TWO_EXPERT_RANKS, world_size=2),
    "FP8, blockwise, weights, save": _fp8(
        "blockwise", "precision.fp8_param=true", parts=["evaluation", "save"]
    ),
    "FP8, blockwise, recompute": _fp8(
        "blockwise", _SELECTIVE, "training.recompute_modules=[layernorm,moe_act]"
    ),
    "FP8, deduplicated": _fp8(
        "blockwise", _TWO_EXPERT_RANKS, "moe.dispatcher=alltoall_dedup", world_size=2
    ),
    "FP8, DeepEP": _fp8("blockwise", _TWO_EXPERT_RANKS, _FLEX, world_size=2),
    "FP8, HybridEP": _fp8(
        "blockwise", _TWO_EXPERT_RANKS, _FLEX, "moe.flex_backend=hybridep", world_size=2
    ),
    "FP8, full width": shipped(ROOT / "configs/models/moepp_7b_16_4_fp8.yaml"),
    "recompute moe_act": smallest(_SELECTIVE, "training.recompute_modules=[moe_act]"),
    "recompute core_attn": smallest(_SELECTIVE, "training.recompute_modules=[core_attn]"),
    "recompute layernorm, moe": smallest(_SELECTIVE, "training.recompute_modules=[layernorm,moe]"),
    # Evaluation calls the layers one after another.
    "combined schedule": smallest(
        _TWO_EXPERT_RANKS,
        "parallel.overlap_moe_expert_parallel_comm=true",
        world_size=2,
        sequences=4,
        parts=["evaluation"],
    ),
    "combined schedule, delayed weight gradients": smallest(
        _TWO_EXPERT_RANKS,
        "parallel.overlap_moe_expert_parallel_comm=true",
        "parallel.delay_wgrad_compute=true",
        "parallel.overlap_grad_reduce=false",
        "parallel.overlap_param_gather=false",
        world_size=2,
        sequences=4,
    ),
    "multi-token prediction": smallest("model.mtp_num_layers=1"),
    "packed documents": smallest("data.reset_attention_mask=true"),
    "norms of queries and keys": smallest("model.qk_layernorm=true", "model.num_query_groups=4"),
    "norms of all heads": smallest("model.qk_layernorm=true", "model.qk_layernorm_scope=all_heads"),
    "bf16 moments, biases": smallest(
        "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16", "model.qkv_bias=true"
    ),
    "gated shared expert, tied embeddings": smallest(
        "moe.shared_expert_ffn_hidden_size=256",
        "moe.shared_expert_gate=true",
        "model.tie_embeddings=true",
    ),
    "without kernels": smallest("moe.fused=false", "precision.cross_entropy=native"),
    "groups, sigmoid, deterministic": smallest(
        "moe.num_groups=4",
        "moe.group_topk=2",
        "moe.score_function=sigmoid",
        "training.deterministic=true",
    ),
    "Muon": smallest("optimizer.kind=muon", "parallel.overlap_param_gather=false"),
    "fp32": smallest("precision.dtype=fp32"),
    "latent attention": shipped(ROOT / "configs/models/deepseek_v3_256_64.yaml"),
    "megatron, combined schedule": smallest(
        _TWO_EXPERT_RANKS,
        "parallel.overlap_moe_expert_parallel_comm=true",
        "megatron.high_priority_a2a_comm_stream=true",
        "megatron.ep_overlap_early_attn_memory_release=true",
        _OFFLOADING,
        _OFFLOADED,
        world_size=2,
        sequences=4,
        parts=["evaluation"],
    ),
    "HybridEP, its own permutation": smallest(
        _TWO_EXPERT_RANKS,
        _FLEX,
        "moe.flex_backend=hybridep",
        "megatron.moe_permute_fusion_into_hybridep=true",
        world_size=2,
    ),
    "vanilla, fused router": smallest(*VANILLA, "megatron.moe_router_fusion=true"),
    "fused residual": smallest("megatron.fused_residual_rmsnorm=true", sequences=2),
    "fused rotation": smallest(
        "megatron.fused_single_qkv_rope=true", sequences=2, parts=["evaluation"]
    ),
    "offloading": smallest(_OFFLOADING, _OFFLOADED, sequences=2, parts=["evaluation"]),
    "offloading, pipeline": smallest(
        _OFFLOADING, _OFFLOADED, _STAGES, "model.num_layers=4", world_size=2, sequences=4
    ),
    "FP8, offloading": _fp8("blockwise", _OFFLOADING, _OFFLOADED),
}
# What others of `ENGINE` and `LOCAL` have by parts, or with more: with the slow tests.
COVERED = (
    "guards, budget, health, evaluation, save",
    "first stage, expert parallel",
    "capacity, context parallel",
    "deduplicated",
    "DeepEP",
    "HybridEP",
    "FP8, delayed",
    "FP8, tensorwise, weights",
    "FP8, full width",
    "recompute moe_act",
    "recompute core_attn",
    "recompute layernorm, moe",
    "combined schedule",
    "without kernels",
    "offloading, pipeline",
    "FP8, offloading",
    "MXFP8, expert parallel",
    "MXFP8, combined schedule, offloading",
    "MXFP8, full width",
)
# On a Blackwell GPU.
MXFP8 = {
    "MXFP8, evaluation, save": _fp8("mxfp8", parts=["evaluation", "save"]),
    "MXFP8, expert parallel": _fp8("mxfp8", _TWO_EXPERT_RANKS, world_size=2),
    "MXFP8, DeepEP": _fp8("mxfp8", _TWO_EXPERT_RANKS, _FLEX, world_size=2),
    "MXFP8, HybridEP": _fp8(
        "mxfp8", _TWO_EXPERT_RANKS, _FLEX, "moe.flex_backend=hybridep", world_size=2
    ),
    "MXFP8, tensor parallel, recompute": _fp8(
        "mxfp8",
        *_TENSOR_AND_CONTEXT,
        _SELECTIVE,
        "training.recompute_modules=[layernorm,moe_act]",
        world_size=4,
        sequences=1,
    ),
    "MXFP8, combined schedule, offloading": _fp8(
        "mxfp8",
        _TWO_EXPERT_RANKS,
        "parallel.overlap_moe_expert_parallel_comm=true",
        _OFFLOADING,
        _OFFLOADED,
        world_size=2,
        sequences=4,
    ),
    "MXFP8, full width": shipped(
        ROOT / "configs/models/moepp_7b_16_4_fp8.yaml", 2, "precision.fp8_recipe=mxfp8"
    ),
}
