"""ZEDA's formats, both ways: Qwen3-MoE and GLM-4.7-Flash with zero-computation experts.

Source: the classes of github.com/TsinghuaC3I/ZEDA (arXiv 2605.18643). `zce_types` and `zce_nums`
extend the router by experts without an FFN, whose rows come behind those of the FFN experts. The
names of all other tensors are those of the model that ZEDA began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.config.problem import Problem, raise_problems, show
from moepp_megatron.experts import CONSTANT, COPY, LOCAL_KINDS, ZERO
from moepp_megatron.interop.expressible import Row, refusals, unknown_there
from moepp_megatron.interop.hf_config import assemble, shared_fields
from moepp_megatron.interop.hf_decoder import require
from moepp_megatron.interop.latent_rules import LATENT_EPSILON, epsilon_warnings, latent_fields
from moepp_megatron.interop.moepp_rules import constant_rules
from moepp_megatron.interop.tensor_rules import TensorRule, same
from moepp_megatron.interop.upcycle_sources import SourceKind, model_rules, source_kind

_KINDS = (CONSTANT, COPY, ZERO)


@dataclass(frozen=True)
class _Family:
    """A model that ZEDA extended: its names, and the kind of source with the same tensors."""

    model_type: str
    architecture: str
    source: str
    rows: tuple[Row, ...]
    fields: Callable[[Config], dict[str, Any]]

    @property
    def kind(self) -> SourceKind:
        return source_kind({"model_type": self.source})


def zeda_hf_config(config: Config) -> dict[str, Any]:
    """ZEDA's `config.json`; ConfigError names each reason why the format cannot express it."""
    family = _family(config.model.latent_attention is not None)
    raise_problems(_problems(config, family))
    moe, fields = config.moe, shared_fields(config)
    counts = {kind.name: moe.count(kind) for kind in _KINDS if moe.count(kind)}
    return (
        fields
        | {
            "model_type": family.model_type,
            "architectures": [family.architecture],
            "attention_bias": False,
            "moe_intermediate_size": config.expert_ffn_hidden_size,
            "num_experts_per_tok": moe.router_topk,
            "norm_topk_prob": moe.gate_normalization == "selected",
            "zce_types": list(counts),
            "zce_nums": list(counts.values()),
            # ZEDA's classes take it for true, and then no token selects one of these experts.
            "use_zce_mask": False,
        }
        | family.fields(config)
    )


def is_zeda(hf: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of ZEDA's: its recipe adds the fields and may leave the type."""
    return "zce_nums" in hf or hf.get("model_type") in [row.model_type for row in _FAMILIES]


def zeda_config(hf: Mapping[str, Any], name: str, dtype: str | None = None) -> Config:
    """Our configuration of one of ZEDA's models; ConfigError if it is another, or masked.

    `dtype` is fp32 or bf16 instead of the checkpoint's.
    """
    counts = _counts(hf)
    kind = _family("kv_lora_rank" in hf).kind
    assert kind.moe is not None, "both families have experts"
    epsilon = require(hf, "rms_norm_eps")
    # Megatron, with which ZEDA trains, adds the same in the norms of latent attention.
    model = kind.model({**hf, "rms_norm_eps": LATENT_EPSILON}) | {"norm_epsilon": epsilon}
    moe = kind.moe({"first_k_dense_replace": 1, **hf})
    if kind.bias is not None:
        moe |= {"gate_normalization": "selected", "selection_bias": True}
        if hf.get("mlp_layer_types") is not None:
            known = {"dense": 0, "sparse": 1}
            moe["layer_freq"] = [known.get(layer, layer) for layer in hf["mlp_layer_types"]]
    if moe.get("num_groups", 1) != 1:
        raise ConfigError(
            f"config.json: n_group ({hf['n_group']}) must be 1: ZEDA's groups divide all experts, "
            "and this package's the FFN experts; such a checkpoint cannot be converted"
        )
    return assemble(model, moe | counts | {"gating_residual": False}, hf, name, dtype)


def zeda_rules(config: Config) -> Iterator[TensorRule]:
    """Every tensor by the names of Qwen3-MoE or GLM-4.7-Flash; gates have rows for all experts."""
    moe, width = config.moe, config.model.hidden_size
    kind = _family(config.model.latent_attention is not None).kind

    def router(layer: int, ours: str, theirs: str) -> Iterator[TensorRule]:
        gate = f"{theirs}{kind.gate}.weight"
        yield same(ours + "router.weight", gate, moe.num_experts, width)
        if kind.bias is not None:
            yield same(ours + "router.expert_bias", theirs + kind.bias, moe.num_experts)
        yield from constant_rules(config, ours, ours, theirs + "mlp.experts.")

    return model_rules(kind, config, router)


def zeda_warnings(config: Config) -> Iterator[str]:
    """Warnings about what readers of the format do otherwise."""
    kinds = [kind for kind in _KINDS if config.moe.count(kind)]
    if kinds not in ([], [COPY], [ZERO]):
        counts = ", ".join(f"moe.{kind.setting} ({config.moe.count(kind)})" for kind in kinds)
        yield (
            f"{counts}: ZEDA's class for transformers computes them, its server only models that "
            "have either copy or zero experts"
        )
    is_dense = not all(config.moe.moe_layer_pattern(config.model.num_layers))
    if is_dense and config.model.latent_attention is None:
        yield (
            f"moe.layer_freq ({show(config.moe.layer_freq)}): ZEDA's server takes every layer of "
            "Qwen3 for a MoE layer"
        )
    yield from epsilon_warnings(config)


def _family(is_latent: bool) -> _Family:
    return _GLM if is_latent else _QWEN


def _counts(hf: Mapping[str, Any]) -> dict[str, int]:
    """Our numbers of zero-computation experts; ConfigError if they are masked or out of order."""
    types, numbers = require(hf, "zce_types"), require(hf, "zce_nums")
    known = [kind.name for kind in _KINDS]
    are_lists = isinstance(types, list) and isinstance(numbers, list)
    if not are_lists or types != [k for k in known if k in types] or len(types) != len(numbers):
        raise ConfigError(
            f"config.json: zce_types ({show(types)}) must be some of {', '.join(known)} in this "
            f"order, with one of zce_nums ({show(numbers)}) for each; such a checkpoint cannot be "
            "converted"
        )
    mask = hf.get("use_zce_mask", True)
    if mask is not False:
        raise ConfigError(
            f"config.json: use_zce_mask ({show(mask)}) must be false: with it, or without this "
            "field, no token selects a zero-computation expert; set it to false if the model was "
            "trained with them"
        )
    by_name = dict(zip(types, numbers, strict=True))
    return {kind.setting: by_name.get(kind.name, 0) for kind in LOCAL_KINDS}


def _problems(config: Config, family: _Family) -> Iterator[Problem]:
    latent = config.model.latent_attention
    ours = "use --layout moepp" if latent is None else "ZEDA's formats cannot express it"
    yield from refusals(config, (*_COMMON, *family.rows), "--layout zeda", ours)
    if latent is None:
        return
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    if sorted(pattern) != pattern:
        rule = "must have all dense layers first for --layout zeda: GLM-4.7-Flash counts them"
        yield Problem("moe.layer_freq", config.moe.layer_freq, rule, ours)
    shared, inner = config.moe.shared_expert_ffn_hidden_size or 0, config.expert_ffn_hidden_size
    if shared == 0 or shared % inner:
        rule = (
            f"must be a multiple of an FFN expert's width ({inner}) for --layout zeda: "
            "GLM-4.7-Flash counts shared experts"
        )
        yield Problem("moe.shared_expert_ffn_hidden_size", shared or None, rule, ours)
    if latent.q_lora_rank is None:
        rule = "must be a width for --layout zeda: queries are compressed there"
        yield Problem("model.latent_attention.q_lora_rank", None, rule, ours)


def _qwen_fields(config: Config) -> dict[str, Any]:
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    return {
        "head_dim": config.model.head_dim,
        "num_experts": config.moe.num_ffn_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, is_moe in enumerate(pattern) if not is_moe],
    }


def _glm_fields(config: Config) -> dict[str, Any]:
    moe = config.moe
    pattern = moe.moe_layer_pattern(config.model.num_layers)
    return {
        **latent_fields(config),
        "rope_interleave": True,
        "n_routed_experts": moe.num_ffn_experts,
        "n_shared_experts": (moe.shared_expert_ffn_hidden_size or 0)
        // config.expert_ffn_hidden_size,
        "routed_scaling_factor": moe.gate_scale,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "mlp_layer_types": ["sparse" if is_moe else "dense" for is_moe in pattern],
        "first_k_dense_replace": pattern.index(True),
        "num_nextn_predict_layers": 0,
    }


_COMMON: tuple[Row, ...] = (
    *unknown_there(_KINDS),
    ("moe.constants_shared", (False,), "each layer has its own constant experts"),
    ("moe.shared_expert_gate", (False,), "shared experts have no gate there"),
)
_QWEN = _Family(
    "qwen3_moe_plus_plus",
    "Qwen3MoePlusPlusForCausalLM",
    "qwen3_moe",
    (
        ("model.qk_layernorm", (True,), "Qwen3 normalises queries and keys"),
        ("model.qk_layernorm_scope", ("head",), "Qwen3 normalises each head by itself"),
        ("model.qkv_bias", (False,), "Qwen3 has no biases"),
        ("moe.score_function", ("softmax",), "Qwen3-MoE's scores"),
        ("moe.gate_normalization", ("selected", "none"), "zero experts count in the sum of gates"),
        ("moe.selection_bias", (False,), "Qwen3-MoE has no selection bias"),
        ("moe.gate_scale", (1.0,), "Qwen3-MoE does not scale gates"),
        ("moe.shared_expert_ffn_hidden_size", (None,), "Qwen3-MoE has no shared expert"),
    ),
    _qwen_fields,
)
_GLM = _Family(
    "glm4_moe_lite_plus_plus",
    "Glm4MoeLitePlusPlusForCausalLM",
    "deepseek_v3",
    (
        ("model.latent_attention.rope_type", ("rope",), "positions are not stretched there"),
        ("model.qk_layernorm", (True,), "GLM-4.7-Flash normalises compressed vectors"),
        ("moe.score_function", ("sigmoid",), "GLM-4.7-Flash's scores"),
        ("moe.gate_normalization", ("selected",), "zero experts count in the sum of gates"),
        ("moe.selection_bias", (True,), "GLM-4.7-Flash has a selection bias"),
    ),
    _glm_fields,
)
_FAMILIES = (_QWEN, _GLM)
