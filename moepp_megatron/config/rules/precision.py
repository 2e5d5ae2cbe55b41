"""Rules of number formats: what FP8 needs of the model, the layout and the optimizer.

Each rule names the code that would fail otherwise; none of it depends on the machine
(`moepp_megatron.runtime.fp8` asks what that can do).
"""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config, LatentAttentionSection

# Sides of an FP8 GEMM are multiples of this many values, under each recipe that Hopper has
# (Transformer Engine 2.20, `autocast` and `get_align_size_for_quantization`).
_FP8_ALIGNMENT = 16


def _fp8_rests_on_bf16(config: Config) -> Iterator[Problem]:
    """FP8 is a way to run bf16 GEMMs, in Transformer Engine on a GPU."""
    precision = config.precision
    if precision.fp8 is not None and precision.dtype != "bf16":
        yield Problem(
            "precision.fp8",
            precision.fp8,
            f"must have precision.dtype ({precision.dtype}) bf16, with Transformer Engine on a GPU",
            "set precision.dtype to bf16, or precision.fp8 to null",
        )
    if precision.fp8 is not None:
        return
    for key, off in (
        ("fp8_recipe", None),
        ("fp8_param", False),
        ("first_last_layers_bf16", False),
    ):
        if getattr(precision, key) != off:
            yield Problem(
                f"precision.{key}",
                getattr(precision, key),
                "must come with precision.fp8, which is null",
                f"set precision.fp8 to e4m3 or hybrid, or leave precision.{key} out",
            )


def _fp8_recipe_is_hoppers(config: Config) -> Iterator[Problem]:
    """MXFP8 needs compute capability 10.0 (Transformer Engine, `_compute_mxfp8_support`)."""
    if config.precision.recipe == "mxfp8":
        yield Problem(
            "precision.fp8_recipe",
            "mxfp8",
            "must be delayed, tensorwise or blockwise: the tensor cores of Hopper have no MXFP8 "
            "(Blackwell's have), and this package has no layout for it",
            "use blockwise, which also scales in blocks",
        )


def _fp8_widths_are_aligned(config: Config) -> Iterator[Problem]:
    """Both sides of every weight shard are multiples of 16 (`assert_dim_for_fp8_exec`)."""
    if config.precision.fp8 is None:
        return
    model, moe = config.model, config.moe
    tp, etp = config.parallel.tensor_model_parallel_size, config.parallel.expert_tensor_size
    name = f"{'moe' if moe.ffn_hidden_size is not None else 'model'}.ffn_hidden_size"
    widths = {("model.hidden_size", model.hidden_size): _FP8_ALIGNMENT}
    widths[name, config.expert_ffn_hidden_size] = _FP8_ALIGNMENT * etp
    if moe.shared_expert_ffn_hidden_size is not None:
        key = ("moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size)
        widths[key] = _FP8_ALIGNMENT * tp
    if not all(moe.moe_layer_pattern(model.num_layers)):
        key = ("model.ffn_hidden_size", model.ffn_hidden_size)
        widths[key] = max(_FP8_ALIGNMENT * tp, widths.get(key, 0))
    for (name, value), divisor in widths.items():
        yield from must_divide(name, value, divisor, f"{divisor} for FP8")


def _fp8_heads_are_aligned(config: Config) -> Iterator[Problem]:
    """The shards of the projections around attention are multiples of 16 too."""
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    if config.precision.fp8 is None or model.hidden_size % _FP8_ALIGNMENT:
        return
    if model.num_attention_heads % ranks:
        return  # said by another rule
    if model.latent_attention is not None:
        yield from _fp8_latent_vectors_are_aligned(model.latent_attention, ranks, config)
        return
    heads, groups = model.num_attention_heads // ranks, max(model.query_groups // ranks, 1)
    for what, channels in (
        ("query", heads * model.head_dim),
        ("query, key and value", (heads + 2 * groups) * model.head_dim),
    ):
        if channels % _FP8_ALIGNMENT:
            yield Problem(
                "model.num_attention_heads",
                model.num_attention_heads,
                f"must give every rank a multiple of {_FP8_ALIGNMENT} {what} channels for FP8, "
                f"not {channels} (heads of {model.head_dim}, "
                f"parallel.tensor_model_parallel_size {ranks})",
                "use heads of 16 channels or more (model.kv_channels), or fewer ranks",
            )
            return


def _fp8_latent_vectors_are_aligned(
    latent: LatentAttentionSection, ranks: int, config: Config
) -> Iterator[Problem]:
    """Compressed vectors are whole on every rank; what heads get from them is split."""
    heads = config.model.num_attention_heads // ranks
    name = "model.latent_attention"
    for key, what, channels in (
        ("q_lora_rank", "compressed query", latent.q_lora_rank or 0),
        ("kv_lora_rank", "compressed key and value", latent.kv_lora_rank),
        (
            "qk_pos_emb_head_dim",
            "compressed and shared key",
            latent.kv_lora_rank + latent.qk_pos_emb_head_dim,
        ),
        ("qk_head_dim", "query", heads * latent.qk_dim),
        ("v_head_dim", "value", heads * latent.v_head_dim),
        ("qk_head_dim", "key and value", heads * (latent.qk_head_dim + latent.v_head_dim)),
    ):
        if channels % _FP8_ALIGNMENT:
            yield Problem(
                f"{name}.{key}",
                getattr(latent, key),
                f"must give every rank a multiple of {_FP8_ALIGNMENT} {what} channels for FP8, "
                f"not {channels} (parallel.tensor_model_parallel_size {ranks})",
                f"use multiples of {_FP8_ALIGNMENT} for all widths of {name}",
            )
            return


def _fp8_tokens_are_aligned(config: Config) -> Iterator[Problem]:
    """The tokens of a rank's micro-batch are a side of its GEMMs.

    Experts pad their own rows, but the projections around attention and shared experts do not.
    """
    parallel, training = config.parallel, config.training
    if config.precision.fp8 is None:
        return
    ranks = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    tokens = config.model.seq_length // ranks * training.micro_batch_size
    if config.model.seq_length % ranks == 0 and tokens % _FP8_ALIGNMENT:
        yield Problem(
            "model.seq_length",
            config.model.seq_length,
            f"must give every rank a multiple of {_FP8_ALIGNMENT} tokens for FP8, not {tokens} "
            f"(training.micro_batch_size {training.micro_batch_size}, sequences split over "
            f"{ranks} ranks)",
            f"use a multiple of {_FP8_ALIGNMENT * ranks}",
        )


def _fp8_parameters_have_a_master_copy(config: Config) -> Iterator[Problem]:
    """Only the distributed optimizer writes its fp32 copies back into FP8 weights.

    (distrib_optimizer.py, `_copy_main_params_to_model_params`; Megatron-LM's arguments.py demands
    the same of --fp8-param-gather.)
    """
    if config.precision.fp8_param and not config.parallel.use_distributed_optimizer:
        yield Problem(
            "precision.fp8_param",
            True,
            "must have parallel.use_distributed_optimizer (false), which alone turns its fp32 "
            "copies into FP8 weights",
            "set parallel.use_distributed_optimizer to true, or precision.fp8_param to false",
        )


def _bf16_layers_leave_fp8_layers(config: Config) -> Iterator[Problem]:
    """First and last layers in bf16 exclude delayed scaling, and some layers must remain in FP8.

    (transformer_config.py; `get_fp8_context`: per-layer contexts would reduce amaxes wrongly.)
    """
    precision, layers = config.precision, config.model.num_layers
    if precision.fp8 is None or not precision.first_last_layers_bf16:
        return
    if precision.recipe == "delayed":
        yield Problem(
            "precision.first_last_layers_bf16",
            True,
            "must be false with precision.fp8_recipe delayed, whose history of amaxes is reduced "
            "once for all layers",
            "use precision.fp8_recipe tensorwise or blockwise, or set it to false",
        )
    most = layers // config.parallel.pipeline_model_parallel_size
    ends = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    for key in ends:
        if getattr(precision, key) > most:
            yield Problem(
                f"precision.{key}",
                getattr(precision, key),
                f"must be at most the layers of a pipeline rank ({most})",
                "use 1",
            )
            return
    if sum(getattr(precision, key) for key in ends) >= layers:
        yield Problem(
            "precision.num_layers_at_start_in_bf16",
            precision.num_layers_at_start_in_bf16,
            "must leave a layer in FP8: with precision.num_layers_at_end_in_bf16 "
            f"({precision.num_layers_at_end_in_bf16}) all {layers} are in bf16",
            "use fewer, or set precision.fp8 to null",
        )


def _delayed_fp8_keeps_inner_activations(config: Config) -> Iterator[Problem]:
    """megatron-core cannot recompute these under delayed scaling."""
    training = config.training
    inner = sorted({"moe_act", "layernorm"} & set(training.recompute_modules))
    is_selective = training.recompute_granularity == "selective"
    if is_selective and config.precision.recipe == "delayed" and inner:
        yield Problem(
            "training.recompute_modules",
            training.recompute_modules,
            f"must not hold {' or '.join(inner)} with precision.fp8_recipe delayed",
            "use [moe], or set precision.fp8_recipe to tensorwise or blockwise",
        )


def _native_cross_entropy_rounds_to_bf16(config: Config) -> Iterator[Problem]:
    """Its gradient is bf16, whatever the logits are (fused_cross_entropy.py)."""
    if config.precision.cross_entropy == "native" and config.precision.dtype != "bf16":
        yield Problem(
            "precision.cross_entropy",
            "native",
            f"must have precision.dtype ({config.precision.dtype}) bf16, because megatron-core's "
            "fused cross entropy rounds the gradient of the logits to bf16",
            "use auto",
        )


RULES = (
    _native_cross_entropy_rounds_to_bf16,
    _fp8_rests_on_bf16,
    _fp8_recipe_is_hoppers,
    _fp8_widths_are_aligned,
    _fp8_heads_are_aligned,
    _fp8_tokens_are_aligned,
    _fp8_parameters_have_a_master_copy,
    _bf16_layers_leave_fp8_layers,
    _delayed_fp8_keeps_inner_activations,
)
