"""Rules of number formats; none of them depends on the machine (`runtime.fp8` asks what it can)."""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, each, first, group, refuse, values
from moepp_megatron.config.rules.fp8_shapes import RULES as FP8_SHAPES
from moepp_megatron.config.schema import Config


def _inner_recomputed(config: Config) -> list[str]:
    """List recomputed modules that delayed scaling does not allow in megatron-core."""
    training = config.training
    if training.recompute_granularity != "selective":
        return []
    return sorted({"moe_act", "layernorm"} & set(training.recompute_modules))


def _layers_of_a_rank(config: Config) -> int:
    return config.model.num_layers // config.parallel.pipeline_model_parallel_size


def _layers_in_bf16(config: Config) -> int:
    precision = config.precision
    return precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16


def _too_many_at_one_end(key: str) -> Rule:
    return refuse(
        f"precision.{key}",
        lambda c: getattr(c.precision, key) > _layers_of_a_rank(c),
        lambda c: f"must be at most the layers of a pipeline rank ({_layers_of_a_rank(c)})",
        "use 1",
    )


RULES: tuple[Rule, ...] = (
    # Its gradient is bf16, whatever the logits are (fused_cross_entropy.py).
    refuse(
        "precision.cross_entropy",
        lambda c: c.precision.cross_entropy == "native" and c.precision.dtype != "bf16",
        "must have precision.dtype ({precision.dtype}) bf16, because megatron-core's fused cross "
        "entropy rounds the gradient of the logits to bf16",
        "use auto",
    ),
    refuse(
        "precision.fp8",
        lambda c: c.precision.fp8 is not None and c.precision.dtype != "bf16",
        "must have precision.dtype ({precision.dtype}) bf16, with Transformer Engine on a GPU",
        "set precision.dtype to bf16, or precision.fp8 to null",
    ),
    group(
        lambda c: c.precision.fp8 is None,
        each(
            values("precision.fp8_recipe precision.fp8_param precision.first_last_layers_bf16"),
            lambda value: value not in (None, False),
            "must come with precision.fp8, which is null",
            "set precision.fp8 to e4m3 or hybrid, or leave {name} out",
        ),
    ),
    refuse(
        "precision.fp8_param",
        lambda c: c.precision.fp8_param and c.precision.recipe == "mxfp8",
        "must be false with precision.fp8_recipe mxfp8: such weights have not been tried",
        "use false",
    ),
    group(
        lambda c: c.precision.fp8 is not None,
        *FP8_SHAPES,
    ),
    # (distrib_optimizer.py, `_copy_main_params_to_model_params`; Megatron-LM's arguments.py demands
    # the same of --fp8-param-gather.)
    refuse(
        "precision.fp8_param",
        lambda c: c.precision.fp8_param and not c.parallel.use_distributed_optimizer,
        "must have parallel.use_distributed_optimizer (false), which alone turns its fp32 copies "
        "into FP8 weights",
        "set parallel.use_distributed_optimizer to true, or precision.fp8_param to false",
    ),
    group(
        lambda c: c.precision.fp8 is not None and c.precision.first_last_layers_bf16,
        # (transformer_config.py; `get_fp8_context`: per-layer contexts would reduce amaxes
        # wrongly.)
        refuse(
            "precision.first_last_layers_bf16",
            lambda c: c.precision.recipe == "delayed",
            "must be false with precision.fp8_recipe delayed, whose history of amaxes is reduced "
            "once for all layers",
            "use precision.fp8_recipe tensorwise or blockwise, or set it to false",
        ),
        first(
            _too_many_at_one_end("num_layers_at_start_in_bf16"),
            _too_many_at_one_end("num_layers_at_end_in_bf16"),
            refuse(
                "precision.num_layers_at_start_in_bf16",
                lambda c: _layers_in_bf16(c) >= c.model.num_layers,
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
            f"must not hold {' or '.join(_inner_recomputed(c))} with precision.fp8_recipe delayed"
        ),
        "use [moe], or set precision.fp8_recipe to tensorwise or blockwise",
    ),
)
