"""Whether a checkpoint fits a configuration, told from config.yaml before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, load_config
from moepp_megatron.config.problem import Problem, raise_problems
from moepp_megatron.training.checkpoint.names import CONFIG_FILE


def _latent_widths(config: Config) -> dict[str, Any] | None:
    """What of latent attention decides shapes; how it turns positions does not."""
    latent = config.model.latent_attention
    if latent is None:
        return None
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    return {name: getattr(latent, name) for name in names}


# What decides names and shapes of parameters, defaults resolved.
_SHAPES: dict[str, Callable[[Config], Any]] = {
    "model.num_layers": lambda c: c.model.num_layers,
    "model.hidden_size": lambda c: c.model.hidden_size,
    "model.ffn_hidden_size": lambda c: c.model.ffn_hidden_size,
    "model.num_attention_heads": lambda c: c.model.num_attention_heads,
    "model.num_query_groups": lambda c: c.model.query_groups,
    "model.kv_channels": lambda c: c.model.head_dim,
    "model.vocab_size": lambda c: c.model.vocab_size,
    "model.tie_embeddings": lambda c: c.model.tie_embeddings,
    "model.qk_layernorm": lambda c: c.model.qk_layernorm,
    "model.qkv_bias": lambda c: c.model.qkv_bias,
    "model.latent_attention": _latent_widths,
    "moe.num_ffn_experts": lambda c: c.moe.num_ffn_experts,
    "moe.num_zero_experts": lambda c: c.moe.num_zero_experts,
    "moe.num_copy_experts": lambda c: c.moe.num_copy_experts,
    "moe.num_constant_experts": lambda c: c.moe.num_constant_experts,
    "moe.constants_shared": lambda c: c.moe.constants_shared,
    "moe.gating_residual": lambda c: c.moe.gating_residual,
    "moe.two_layer_gate": lambda c: c.moe.two_layer_gate,
    "moe.ffn_hidden_size": lambda c: c.expert_ffn_hidden_size,
    "moe.shared_expert_ffn_hidden_size": lambda c: c.moe.shared_expert_ffn_hidden_size,
    "moe.shared_expert_gate": lambda c: c.moe.shared_expert_gate,
    "moe.layer_freq": lambda c: c.moe.layer_freq,
}
# Not shapes: resuming with another value is allowed, but is another run.
_SCHEDULE = (
    "optimizer.lr",
    "optimizer.min_lr",
    "optimizer.warmup_iters",
    "optimizer.decay_style",
    "training.global_batch_size",
    "training.seed",
    "data.split",
    "precision.dtype",
    "moe.tau",
    "moe.router_topk",
    "moe.constant_temperature",
)


def check_compatible(checkpoint: Path, config: Config) -> list[str]:
    """Refuse a checkpoint whose model has other shapes.

    Returns:
        A line for each setting that differs and changes what is trained, though not its shape.

    Raises:
        ConfigError: The shapes differ, one line a setting.
    """
    try:
        saved = load_config(checkpoint / CONFIG_FILE)
    except ConfigError as error:
        raise ConfigError(
            f"checkpoint ({checkpoint}) must have a configuration that this version reads, and: "
            f"{error}; convert it, or use the version that wrote it"
        ) from error
    raise_problems(_shape_problems(checkpoint, saved, config))
    return [
        f"{name} is {_value(config, name)} and was {_value(saved, name)} in {checkpoint}"
        for name in _SCHEDULE
        if _value(config, name) != _value(saved, name)
    ]


def _shape_problems(checkpoint: Path, saved: Config, config: Config) -> list[Problem]:
    problems = []
    for name, read in _SHAPES.items():
        wanted, found = read(config), read(saved)
        # Where neither gives a value, it follows from others, which are reported.
        is_derived = _value(config, name) is None and _value(saved, name) is None
        if wanted != found and not is_derived:
            rule = f"must be that of the checkpoint {checkpoint} ({found})"
            remedy = f"use {found}, or load another checkpoint"
            if name == "moe.layer_freq":
                rule = f"must place the MoE layers as the checkpoint {checkpoint} ({found})"
                remedy = "use the checkpoint's moe.layer_freq, or load another checkpoint"
            problems.append(Problem(name, wanted, rule, remedy))
    return problems


def _value(config: Config, name: str) -> Any:
    section, key = name.split(".")
    return getattr(getattr(config, section), key)
