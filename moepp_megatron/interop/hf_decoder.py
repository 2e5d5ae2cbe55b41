"""Our `model` section from the fields of a `config.json` that Llama's descendants share."""

from collections.abc import Iterable
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.config.errors import Problem, raise_problems, show
from moepp_megatron.interop.tensor_rules import Fields


def decoder_section(hf: Fields) -> Fields:
    """Our `model` section from the fields that Llama's descendants share.

    ConfigError if this package's decoder lacks a feature, or a field is missing.
    """
    _refuse_unsupported(hf)
    heads = require(hf, "num_attention_heads")
    section = {
        "num_layers": require(hf, "num_hidden_layers"),
        "hidden_size": require(hf, "hidden_size"),
        "ffn_hidden_size": require(hf, "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "seq_length": hf.get("max_position_embeddings", 2048),
        "vocab_size": require(hf, "vocab_size"),
        "rotary_base": rope_theta(hf),
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "init_method_std": hf.get("initializer_range", 0.02),
    }
    if hf.get("head_dim") is not None:
        section["kv_channels"] = hf["head_dim"]
    if hf.get("qk_norm"):
        section["qk_layernorm"] = True
        section["qk_layernorm_scope"] = hf.get("qk_norm_scope", "head")
    if hf.get("qkv_bias"):
        section["qkv_bias"] = True
    return section


def require(hf: Fields, key: str) -> Any:
    """A field that must be there; ConfigError if it is not."""
    if hf.get(key) is None:
        raise ConfigError(f"config.json: {key} (absent) must be given; fetch the checkpoint again")
    return hf[key]


def rope_theta(hf: Fields) -> float:
    """The rotary base, from transformers 5's `rope_parameters` or the older field."""
    stated = {**hf, **(hf.get("rope_parameters") or {})}
    return float(stated.get("rope_theta", 10000.0))


def _refuse_unsupported(hf: Fields) -> None:
    rope_type = (hf.get("rope_parameters") or {}).get("rope_type", "default")
    # Qwen names a window that it does not use.
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    rows = (
        ("hidden_act", hf.get("hidden_act", "silu"), "silu", "SwiGLU"),
        ("rope_scaling", hf.get("rope_scaling"), None, "plain rotary embeddings"),
        ("rope_parameters.rope_type", rope_type, "default", "plain rotary embeddings"),
        ("attention_bias", hf.get("attention_bias", False), False, "no biases"),
        ("mlp_bias", hf.get("mlp_bias", False), False, "no biases"),
        ("sliding_window", window, None, "full attention"),
        ("kv_lora_rank", hf.get("kv_lora_rank"), None, "no converter for latent attention"),
    )
    refuse_fields(((*row, f"this package's decoder has {what}") for *row, what in rows))


def refuse_fields(rows: Iterable[tuple[Any, ...]], how: str = "converted") -> None:
    """Refuse (ConfigError) fields of `config.json`: (name, value, wanted value, reason) of each."""
    raise_problems(
        Problem(
            f"config.json: {name}",
            value,
            f"must be {show(wanted)}: {reason}",
            f"such a checkpoint cannot be {how}",
        )
        for name, value, wanted, reason in rows
        if value != wanted
    )
