"""Section `precision`: number formats, and how FP8 numbers are scaled."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import (
    Rule,
    each,
    first,
    group,
    must_divide,
    no_effect_where,
    no_effect_with,
    no_effect_without,
    refuse,
    values,
)
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


CrossEntropy = Literal["auto", "fused", "native", "unfused"]


def _alignment(config: Config) -> int:
    """Of what both sides are multiples (Transformer Engine 2.20, `quantization_alignment`)."""
    recipe = config.precision.recipe or "delayed"
    return {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}[recipe]


def _widths(config: Config) -> Iterator[Problem]:
    """Both sides of every weight shard."""
    model, moe, alignment = config.model, config.moe, _alignment(config)
    tp, etp = config.parallel.tensor_model_parallel_size, config.parallel.expert_tensor_size
    name = f"{'moe' if moe.ffn_hidden_size is not None else 'model'}.ffn_hidden_size"
    widths = {("model.hidden_size", model.hidden_size): alignment}
    widths[name, config.expert_ffn_hidden_size] = alignment * etp
    if moe.shared_expert_ffn_hidden_size is not None:
        key = ("moe.shared_expert_ffn_hidden_size", moe.shared_expert_ffn_hidden_size)
        widths[key] = alignment * tp
    # A step of 0 layers is refused by a rule of its own.
    if moe.layer_freq and not all(moe.moe_layer_pattern(model.num_layers)):
        key = ("model.ffn_hidden_size", model.ffn_hidden_size)
        widths[key] = max(alignment * tp, widths.get(key, 0))
    for (name, value), divisor in widths.items():
        yield from must_divide(name, value, divisor, f"{divisor} for FP8")


def _heads(config: Config) -> Iterator[Problem]:
    """The shards of projections around attention; compressed vectors are whole on every rank."""
    model, latent, alignment = config.model, config.model.latent_attention, _alignment(config)
    ranks = config.parallel.tensor_model_parallel_size
    heads, groups = model.num_attention_heads // ranks, max(model.query_groups // ranks, 1)
    name, of_heads = "model.num_attention_heads", f"heads of {model.head_dim}, "
    remedy = f"use heads of {alignment} channels or more (model.kv_channels), or fewer ranks"
    rows = [
        (name, "query", heads * model.head_dim),
        (name, "query, key and value", (heads + 2 * groups) * model.head_dim),
    ]
    if latent is not None:
        name, of_heads = "model.latent_attention.", ""
        remedy = f"use multiples of {alignment} for all widths of model.latent_attention"
        compressed, values = latent.kv_lora_rank, heads * latent.v_head_dim
        rows = [
            (name + "q_lora_rank", "compressed query", latent.q_lora_rank or 0),
            (name + "kv_lora_rank", "compressed key and value", compressed),
            (
                name + "qk_pos_emb_head_dim",
                "compressed and shared key",
                compressed + latent.qk_pos_emb_head_dim,
            ),
            (name + "qk_head_dim", "query", heads * latent.qk_dim),
            (name + "v_head_dim", "value", values),
            (name + "qk_head_dim", "key and value", heads * latent.qk_head_dim + values),
        ]
    for name, what, channels in rows:
        if channels % alignment:
            rule = (
                f"must give every rank a multiple of {alignment} {what} channels for FP8, "
                f"not {channels} ({of_heads}parallel.tensor_model_parallel_size {ranks})"
            )
            yield Problem(name, attrgetter(name)(config), rule, remedy)
            return


def _tokens(config: Config) -> Iterator[Problem]:
    """The tokens of a rank's micro-batch are a side of its GEMMs."""
    # Experts pad their own rows, but the projections around attention and shared experts do not.
    parallel, training, alignment = config.parallel, config.training, _alignment(config)
    ranks = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    tokens = config.model.seq_length // ranks * training.micro_batch_size
    if config.model.seq_length % ranks == 0 and tokens % alignment:
        yield Problem(
            "model.seq_length",
            config.model.seq_length,
            f"must give every rank a multiple of {alignment} tokens for FP8, not {tokens} "
            f"(training.micro_batch_size {training.micro_batch_size}, sequences split over "
            f"{ranks} ranks)",
            f"use a multiple of {alignment * ranks}",
        )


def _heads_divide(config: Config) -> bool:
    """True if no other rule already refuses the shapes of attention."""
    ranks = config.parallel.tensor_model_parallel_size
    return (
        config.model.hidden_size % _alignment(config)
        == config.model.num_attention_heads % ranks
        == 0
    )


def _inner_recomputed(config: Config) -> list[str]:
    """List recomputed modules that delayed scaling does not allow in megatron-core."""
    return sorted({"moe_act", "layernorm"} & config.training.recomputed)


def _leaves_no_layer_in_fp8(config: Config) -> bool:
    precision = config.precision
    in_bf16 = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    return in_bf16 >= config.model.num_layers


def _too_many_at_one_end(key: str) -> Rule:
    return refuse(
        f"precision.{key}",
        lambda c: getattr(c.precision, key) > c.layers_per_rank,
        "must be at most the layers of a pipeline rank ({layers_per_rank})",
        "use 1",
    )


class PrecisionSection(Section):
    """Number formats; FP8 names follow megatron-core's TransformerConfig."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of parameters and activations (the optimizer keeps fp32 copies of bf16 parameters)"""
    grad_reduce_in_fp32: bool = True
    """Sum gradients over micro-batches and ranks in fp32; false sums them in bf16: half the memory
    and traffic, and every partial sum is rounded"""
    cross_entropy: CrossEntropy = "auto"
    """Loss implementation: fused, Triton kernels on the logits as they are; native and unfused,
    megatron-core's, on an fp32 copy; auto: fused on a GPU with Triton"""
    fp8: Literal["e4m3", "hybrid"] | None = None
    """FP8 format of the GEMMs (Transformer Engine, GPU); null: off"""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = None
    """FP8 scaling; null with fp8 means delayed; mxfp8 needs a Blackwell GPU"""
    fp8_margin: Annotated[int, Unit("bits", ge=0, le=8)] = 0
    """Powers of two that delayed scaling leaves free above the largest value seen"""
    fp8_amax_history_len: Annotated[int, Unit("steps", ge=1)] = 1024
    """Steps whose largest values delayed scaling remembers"""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """Value of these to use"""
    fp8_param: bool = False
    """Keep the GEMM weights only in FP8, with the optimizer's fp32 copy"""
    first_last_layers_bf16: bool = False
    """Run the first and last layers in bf16"""
    num_layers_at_start_in_bf16: Annotated[int, Unit("layers", ge=0)] = 1
    """With first_last_layers_bf16: first layers in bf16"""
    num_layers_at_end_in_bf16: Annotated[int, Unit("layers", ge=0)] = 1
    """With first_last_layers_bf16: last layers in bf16"""

    @property
    def gradient_bytes(self) -> int:
        """Bytes of a gradient in the buffer that micro-batches add to and ranks reduce."""
        return 4 if self.grad_reduce_in_fp32 else {"fp32": 4, "bf16": 2}[self.dtype]

    @property
    def recipe(self) -> str | None:
        """The FP8 recipe, the default resolved; None without FP8."""
        return None if self.fp8 is None else self.fp8_recipe or "delayed"

    megatron_flags = (
        "fp8-format=fp8 fp8-recipe fp8-margin fp8-amax-history-len fp8-amax-compute-algo "
        "num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 bf16=dtype:bf16 "
        "grad-reduce-in-bf16=grad_reduce_in_fp32:false fp8-param-gather=fp8_param:true "
        "first-last-layers-bf16:true"
    )
    own_rules = (
        # Its gradient is bf16, whatever the logits are (fused_cross_entropy.py).
        refuse(
            "precision.cross_entropy",
            "precision.cross_entropy native and not precision.dtype bf16",
            "must have precision.dtype ({precision.dtype}) bf16, because megatron-core's fused "
            "cross entropy rounds the gradient of the logits to bf16",
            "use auto",
        ),
        refuse(
            "precision.fp8",
            "precision.fp8 and not precision.dtype bf16",
            "must have precision.dtype ({precision.dtype}) bf16, with Transformer Engine on a GPU",
            "set precision.dtype to bf16, or precision.fp8 to null",
        ),
        group(
            "not precision.fp8",
            each(
                values("precision.fp8_recipe precision.fp8_param precision.first_last_layers_bf16"),
                lambda value: value not in (None, False),
                "must come with precision.fp8, which is null",
                "set precision.fp8 to e4m3 or hybrid, or leave {name} out",
            ),
        ),
        refuse(
            "precision.fp8_param",
            "precision.fp8_param and precision.recipe mxfp8",
            "must be false with precision.fp8_recipe mxfp8: such weights have not been tried",
            "use false",
        ),
        group(
            "precision.fp8",
            _widths,
            group(_heads_divide, _heads),
            _tokens,
        ),
        # (distrib_optimizer.py, `_copy_main_params_to_model_params`; Megatron-LM's arguments.py
        # demands the same of --fp8-param-gather.)
        refuse(
            "precision.fp8_param",
            "precision.fp8_param and not parallel.use_distributed_optimizer",
            "must have parallel.use_distributed_optimizer (false), which alone turns its fp32 "
            "copies into FP8 weights",
            "set parallel.use_distributed_optimizer to true, or precision.fp8_param to false",
        ),
        group(
            "precision.fp8 and precision.first_last_layers_bf16",
            # (transformer_config.py; `get_fp8_context`: per-layer contexts would reduce amaxes
            # wrongly.)
            refuse(
                "precision.first_last_layers_bf16",
                "precision.recipe delayed",
                "must be false with precision.fp8_recipe delayed, whose history of amaxes is "
                "reduced once for all layers",
                "use precision.fp8_recipe tensorwise or blockwise, or set it to false",
            ),
            first(
                _too_many_at_one_end("num_layers_at_start_in_bf16"),
                _too_many_at_one_end("num_layers_at_end_in_bf16"),
                refuse(
                    "precision.num_layers_at_start_in_bf16",
                    _leaves_no_layer_in_fp8,
                    "must leave a layer in FP8: with precision.num_layers_at_end_in_bf16 "
                    "({precision.num_layers_at_end_in_bf16}) all {model.num_layers} are in bf16",
                    "use fewer, or set precision.fp8 to null",
                ),
            ),
        ),
        refuse(
            "training.recompute_modules",
            lambda c: c.precision.recipe == "delayed" and _inner_recomputed(c),
            lambda c: (
                f"must not hold {' or '.join(_inner_recomputed(c))} with precision.fp8_recipe "
                "delayed"
            ),
            "use [moe], or set precision.fp8_recipe to tensorwise or blockwise",
        ),
    )
    excludes = (
        (
            "precision.fp8_param",
            "model.latent_attention",
            "its projections have not been tested with weights in FP8",
        ),
    )
    no_effect = (
        no_effect_with(
            "precision.dtype",
            "fp32",
            "precision.grad_reduce_in_fp32",
            "set precision.dtype to bf16",
        ),
        no_effect_where(
            "not precision.recipe delayed",
            "without precision.fp8_recipe delayed",
            "precision.fp8_margin precision.fp8_amax_history_len precision.fp8_amax_compute_algo",
            "leave it out",
        ),
        no_effect_without(
            "precision.first_last_layers_bf16",
            "precision.num_layers_at_start_in_bf16 precision.num_layers_at_end_in_bf16",
            "set precision.first_last_layers_bf16 to true",
        ),
    )
