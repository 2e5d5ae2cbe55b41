"""Converts between our configuration and `config.json` of the released and of our own format.

The released format (`model_type: MoE++`) fixes 2 constant, 1 copy and 1 zero expert, top-2 routing
and gating residuals. Ours (`model_type: moepp`) holds all settings that a forward pass depends on.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config, ConfigError, parse_config
from moepp_megatron.config.errors import Problem, raise_problems, show
from moepp_megatron.experts import FFN_ONLY, KINDS
from moepp_megatron.interop.expressible import Format, Row, refuse_settings
from moepp_megatron.interop.tensor_rules import Fields, moepp_rules
from moepp_megatron.layer_settings import DECLARED, EXPORTED, EXTENSIONS

_RELEASED_TYPE = "MoE++"
_OWN_TYPE = "moepp"
MOEPP_TYPES = (_RELEASED_TYPE, _OWN_TYPE)
# moe_plus_plus_layer.py of the released model: MOE_TOP_K, Constant, and one of the other kinds.
_RELEASED_TOPK = 2
_RELEASED_KINDS = {
    **FFN_ONLY,
    "num_constant_experts": 2,
    "num_copy_experts": 1,
    "num_zero_experts": 1,
}
# Settings of which the released format can say more than their defaults.
_RELEASED_FIELDS = {"expert_input_scale", "two_layer_gate", "logits_norm_std"}
# What fine-tuning an export needs besides the settings that give its outputs.
_BALANCE = ("balance_scope", "balance_loss")
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


def config_from_hf(hf: Fields, name: str, dtype: str | None = None) -> Config:
    """Our configuration of a MoE++ checkpoint, from its `config.json`.

    `dtype` is fp32 or bf16 instead of the checkpoint's. ConfigError if it is another kind of model,
    or has settings that this package does not have.
    """
    kind = hf.get("model_type")
    if kind == _RELEASED_TYPE:
        moe = _released_moe(hf)
    elif kind == _OWN_TYPE:
        moe = _own_moe(hf)
    else:
        raise ConfigError(
            f"config.json: model_type ({kind}) must be {_RELEASED_TYPE}, {_OWN_TYPE} or ZEDA's; "
            "use `moepp convert upcycle` for other models"
        )
    return assemble(decoder_section(hf), moe, hf, name, dtype)


def assemble(
    model: Fields,
    moe: Fields,
    hf: Fields,
    name: str,
    dtype: str | None,
    lr: float = 1.0e-4,
) -> Config:
    """A complete configuration; settings that a checkpoint lacks get the smallest valid value."""
    return parse_config(
        {
            "run": {"dir": f"runs/{name}", "name": name},
            "model": model,
            "moe": moe,
            "precision": {"dtype": dtype or _checkpoint_dtype(hf)},
            "optimizer": {"lr": lr},
            "training": {"train_iters": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def _checkpoint_dtype(hf: Fields) -> str:
    """fp32 or bf16 from `dtype` (transformers 5) or `torch_dtype`; ConfigError for another."""
    stated = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if stated not in _DTYPES:
        raise ConfigError(
            f"config.json: dtype ({stated}) must be float32 or bfloat16; convert it with "
            "--dtype fp32 or --dtype bf16"
        )
    return _DTYPES[stated]


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
        "rotary_base": _rope_theta(hf),
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "init_method_std": hf.get("initializer_range", 0.02),
        "kv_channels": hf.get("head_dim"),
        "qk_layernorm": bool(hf.get("qk_norm")),
        "qkv_bias": bool(hf.get("qkv_bias")),
    }
    if section["qk_layernorm"]:
        section["qk_layernorm_scope"] = hf.get("qk_norm_scope", "head")
    return section


def require(hf: Fields, key: str) -> Any:
    """A field that must be there; ConfigError if it is not."""
    if hf.get(key) is None:
        raise ConfigError(f"config.json: {key} (absent) must be given; fetch the checkpoint again")
    return hf[key]


def _rope_theta(hf: Fields) -> float:
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


def _released_moe(hf: Fields) -> Fields:
    counts = require(hf, "num_experts")
    counts = counts if isinstance(counts, list) else [counts]
    if len(set(counts)) != 1:
        raise ConfigError(
            f"config.json: num_experts ({counts}) must be one number for all layers; the released "
            "code reads only the first"
        )
    fixed = sum(_RELEASED_KINDS.values())
    if counts[0] <= fixed:
        raise ConfigError(
            f"config.json: num_experts ({counts[0]}) must be more than {fixed}, the last of which "
            "are constant, constant, copy and zero; fetch the checkpoint again"
        )
    mixtral = hf.get("moe_use_mixtral_gating", False)
    plain_input = mixtral or hf.get("moe_feature_no_mul_topk", False)
    layers, interval = require(hf, "num_hidden_layers"), hf.get("moe_expert_interval", 1)
    return {
        "num_ffn_experts": counts[0] - fixed,
        **_RELEASED_KINDS,
        "router_topk": _RELEASED_TOPK,
        "gating_residual": True,
        "gate_normalization": "selected" if mixtral else "nonzero",
        "expert_input_scale": 1.0 if plain_input else float(_RELEASED_TOPK),
        "two_layer_gate": hf.get("moe_2layer_gate", True),
        "logits_norm_std": float(hf.get("moe_gate_norm_std", 1.0))
        if hf.get("moe_use_logits_norm", False)
        else None,
        # The released code counts from 1: with interval n, layers n, 2n, ... are MoE layers.
        "layer_freq": 1
        if interval == 1
        else [int((layer + 1) % interval == 0) for layer in range(layers)],
    }


def _own_moe(hf: Fields) -> Fields:
    # An export that is older than a setting does without it, as the exported code does.
    optional = {*EXTENSIONS, *_BALANCE}
    moe = {
        key: hf.get(key, DECLARED[key].default) if key in optional else require(hf, key)
        for key in (*EXPORTED, *_BALANCE)
    }
    moe["router_topk"] = require(hf, "num_experts_per_tok")
    moe["layer_freq"] = require(hf, "moe_layers")
    moe["ffn_hidden_size"] = hf.get("moe_intermediate_size")
    moe["shared_expert_ffn_hidden_size"] = hf.get("shared_expert_intermediate_size")
    moe["shared_expert_gate"] = hf.get("shared_expert_gate", False)
    return moe


def refuse_uncomputed(config: Config) -> None:
    """Refuse (ConfigError) what an export's modelling file does not declare to compute."""
    text = (Path(__file__).parent / "hf_files" / "modeling_moepp.py").read_text(encoding="utf-8")
    declared = next(
        statement.value
        for statement in ast.parse(text).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "COMPUTES"
    )
    computes = {name: known.split() for name, known in ast.literal_eval(declared).items()}
    free = [kind.setting for kind in KINDS if kind.name in computes["kinds"]] + computes["others"]
    unset = {name: [row.default] for name, row in DECLARED.items()}
    unset |= {name: [none] for name, none in FFN_ONLY.items()}
    rows = [
        (f"moe.{name}", tuple(computes.get(name, unset[name])), "its modelling file lacks others")
        for name in DECLARED
        if name not in free
    ]
    remedy = "score and generate from the checkpoint"
    refuse_settings(config, rows, "an export", remedy)


def _own_fields(config: Config) -> Fields:
    """`config.json` of our own format, without `architectures` and `auto_map`."""
    moe = config.moe
    fields = {key: getattr(moe, key) for key in EXPORTED}
    if moe.is_vanilla and moe.score_function != "softmax" and moe.router_topk > 1:
        # What megatron-core's own router does there.
        fields["gate_normalization"] = "selected"
    shared = _shared_fields(config)
    # What transformers 5 reads; the older names are deprecated.
    del shared["rope_scaling"]
    rope = {"rope_type": "default", "rope_theta": shared.pop("rope_theta")}
    return {
        "model_type": _OWN_TYPE,
        **shared,
        "rope_parameters": rope,
        **fields,
        "router_aux_loss_coef": moe.balance_coeff,
        **{key: getattr(moe, key) for key in _BALANCE},
        "moe_intermediate_size": config.expert_ffn_hidden_size,
        "shared_expert_intermediate_size": moe.shared_expert_ffn_hidden_size,
        "shared_expert_gate": moe.shared_expert_gate,
        "num_experts_per_tok": moe.router_topk,
        "moe_layers": [int(flag) for flag in moe.moe_layer_pattern(config.model.num_layers)],
        "head_dim": config.model.head_dim,
        "qk_norm": config.model.qk_layernorm,
        "qk_norm_scope": config.model.qk_layernorm_scope,
        "qkv_bias": config.model.qkv_bias,
    }


def _released_fields(config: Config) -> Fields:
    """`config.json` of the released format; ConfigError if the format cannot express the model."""
    remedy = "use --layout moepp, which has no such limit"
    refuse_settings(config, _released_rows(config), "--layout released", remedy)
    moe = config.moe
    mixtral = moe.gate_normalization == "selected"
    return {
        "model_type": _RELEASED_TYPE,
        **_shared_fields(config),
        "num_experts": [moe.num_experts],
        "moe_expert_interval": _interval(config),
        "moe_use_mixtral_gating": mixtral,
        "moe_2layer_gate": moe.two_layer_gate,
        "moe_use_logits_norm": moe.logits_norm_std is not None,
        "moe_gate_norm_std": 1.0 if moe.logits_norm_std is None else moe.logits_norm_std,
        "moe_feature_no_mul_topk": moe.expert_input_scale == 1.0 and not mixtral,
    }


def _released_warnings(config: Config) -> Iterator[str]:
    """Warnings about how the released code treats a model that its format can express."""
    interval = _interval(config)
    if interval is not None and interval > 1:
        yield (
            "the released code cannot run this model: with moe_expert_interval "
            f"({interval}) above 1 its layers without experts fail; --layout moepp runs in "
            "transformers"
        )


def _shared_fields(config: Config) -> Fields:
    """Fields that all formats here have in common, by the names that older readers know too."""
    model = config.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
    }


def plain_fields(config: Config) -> Fields:
    """Fields that the MoE models of `expressible.PLAIN` have in common."""
    return {
        **_shared_fields(config),
        "num_experts_per_tok": config.moe.router_topk,
        "norm_topk_prob": config.moe.gate_normalization == "selected",
        "head_dim": config.model.head_dim,
        "moe_intermediate_size": config.expert_ffn_hidden_size,
    }


def _released_rows(config: Config) -> Iterator[Row]:
    """Yield the released format's value of each setting that it lacks."""
    model, moe = config.model, config.moe
    # With Mixtral gating the released code never scales the experts' input.
    scales = (1.0,) if moe.gate_normalization == "selected" else (1.0, 2.0)
    accepted: dict[str, tuple[Any, ...]] = {
        "moe.router_topk": (_RELEASED_TOPK,),
        **{f"moe.{key}": (value,) for key, value in _RELEASED_KINDS.items()},
        "moe.gating_residual": (True,),
        "moe.gate_normalization": ("nonzero", "selected"),
        "moe.score_function": ("softmax",),
        "moe.expert_input_scale": scales,
        **{
            f"moe.{key}": (DECLARED[key].default,)
            for key in EXPORTED
            if key in EXTENSIONS and key not in _RELEASED_FIELDS
        },
        "moe.shared_expert_ffn_hidden_size": (None,),
        "moe.ffn_hidden_size": (None, model.ffn_hidden_size),
        "model.qk_layernorm": (False,),
        "model.qkv_bias": (False,),
        "model.kv_channels": (None, model.hidden_size // model.num_attention_heads),
    }
    for name, values in accepted.items():
        yield name, values, "the released code has nothing else"
    if _interval(config) is None:
        yield "moe.layer_freq", (1,), "or every n-th layer, counted from the n-th"


def _interval(config: Config) -> int | None:
    """The released `moe_expert_interval`, or None where the MoE layers follow no such pattern."""
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    interval = pattern.index(True) + 1
    expected = [(layer + 1) % interval == 0 for layer in range(len(pattern))]
    return interval if pattern == expected else None


OWN = Format(_own_fields, moepp_rules, ("MoEPPConfig", "MoEPPForCausalLM"), dtype_field="dtype")
RELEASED = Format(
    _released_fields,
    moepp_rules,
    ("MoeConfig", "MoeForCausalLM"),
    keeps_unused=True,
    warnings=_released_warnings,
)
