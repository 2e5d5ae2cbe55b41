"""The kinds of models that can be upcycled, with the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.interop.hf_config import MOEPP_TYPES
from moepp_megatron.interop.hf_decoder import decoder_section, require
from moepp_megatron.interop.hf_latent import (
    deepseek_attention,
    deepseek_decoder_section,
    deepseek_moe,
)
from moepp_megatron.interop.tensor_rules import (
    TensorRule,
    attention_rules,
    decoder_rules,
    dense_mlp_rules,
    row,
    shared_expert_rules,
    stacked,
    unused,
)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class SourceKind:
    """One `model_type`.

    Attributes:
        moe: Fields of our `moe` section that `config.json` decides, or a ConfigError; None for a
            dense model.
        model: Our `model` section.
        gate: Name of the router in a layer; None for a dense model.
        bias: Name of its selection bias; None where there is none.
        experts: Name of FFN expert `{}` in a layer.
        projections: Names of its gate, up and down projection.
        shared: Name of the shared expert in a layer; None where there is none.
        attention: Rules of a layer's attention and norms.
    """

    moe: Callable[[Mapping[str, Any]], dict[str, Any]] | None
    model: Callable[[Mapping[str, Any]], dict[str, Any]]
    gate: str | None = "mlp.gate"
    bias: str | None = None
    experts: str = "mlp.experts.{}"
    projections: tuple[str, str, str] = _PROJECTIONS
    shared: str | None = None
    attention: Callable[[Config, int, bool], Iterator[TensorRule]] = lambda config, layer, is_moe: (
        attention_rules(config, layer)
    )


def source_kind(hf: Mapping[str, Any]) -> SourceKind:
    """The kind of a checkpoint; ConfigError if it is another kind, or its attention is not full."""
    name = hf.get("model_type")
    # ZEDA's recipe leaves the type of the model that it began with.
    if name in MOEPP_TYPES or "zce_nums" in hf:
        raise ConfigError(
            f"config.json: model_type ({name}) must be that of a model without zero-computation "
            "experts, and this is a MoE++ model already; use moepp convert hf-to-mcore"
        )
    if name not in _KINDS:
        raise ConfigError(
            f"config.json: model_type ({name}) must be one of {', '.join(_KINDS)}; other models "
            "cannot be upcycled"
        )
    layers = set(hf.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ConfigError(
            f"config.json: layer_types ({', '.join(sorted(layers))}) must all be full_attention; "
            "such a checkpoint cannot be converted"
        )
    return _KINDS[name]


def extra_tensors(hf: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Layers of multi-token prediction, which come behind the decoder's (DeepSeek-V3)."""
    if "kv_lora_rank" not in hf:
        return []
    layers = require(hf, "num_hidden_layers")
    matches = ((name, _LAYER.match(name)) for name in names)
    return [name for name, match in matches if match is not None and int(match[1]) >= layers]


def expert_rules(kind: SourceKind, config: Config, ours: str, theirs: str) -> Iterator[TensorRule]:
    """Rules of a layer's FFN experts; the one FFN of a dense model is copied into each."""
    width, inner = config.model.hidden_size, config.expert_ffn_hidden_size
    count = config.moe.num_ffn_experts
    gate, up, down = kind.projections
    for index in range(count):
        source = f"{theirs}{kind.experts.format(index)}."
        names = [f"{source}{gate}.weight", f"{source}{up}.weight"]
        yield stacked(
            ours + "experts.experts.linear_fc1.weight", names, inner, width, (count, index)
        )
        key = ours + "experts.experts.linear_fc2.weight"
        yield row(key, count, index, f"{source}{down}.weight", width, inner)


def zero_expert_rules(
    kind: SourceKind, config: Config, theirs: str, indices: range
) -> Iterator[TensorRule]:
    """FFN experts `indices` of a layer whose weights are zeros: what zero experts compute."""
    width, inner = config.model.hidden_size, config.expert_ffn_hidden_size
    gate, up, down = kind.projections
    for index in indices:
        prefix = f"{theirs}{kind.experts.format(index)}."
        yield unused(f"{prefix}{gate}.weight", inner, width)
        yield unused(f"{prefix}{up}.weight", inner, width)
        yield unused(f"{prefix}{down}.weight", width, inner)


def model_rules(
    kind: SourceKind, config: Config, router: Callable[[int, str, str], Iterator[TensorRule]]
) -> Iterator[TensorRule]:
    """Every tensor by the names of a source; `router`: by layer and the beginnings of names."""
    yield from decoder_rules(config)
    for layer, is_moe in enumerate(config.moe.moe_layer_pattern(config.model.num_layers)):
        yield from kind.attention(config, layer, is_moe)
        if not is_moe:
            yield from dense_mlp_rules(config, layer)
            continue
        ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
        yield from expert_rules(kind, config, ours, theirs)
        yield from shared_expert_rules(config, ours, f"{theirs}{kind.shared}")
        yield from router(layer, ours, theirs)


def _mixtral_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    count = hf.get("num_local_experts") or require(hf, "num_experts")
    return {"num_ffn_experts": count, "router_topk": require(hf, "num_experts_per_tok")}


def _softmax_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    is_normalised = hf.get("norm_topk_prob", False)
    return {"gate_normalization": "selected" if is_normalised else "none", **_mixtral_moe(hf)}


def _qwen3_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_softmax_moe(hf),
        "ffn_hidden_size": require(hf, "moe_intermediate_size"),
        "layer_freq": _qwen_pattern(hf),
    }


def _qwen2_moe(hf: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_qwen3_moe(hf),
        "shared_expert_ffn_hidden_size": require(hf, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _qwen2_decoder(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_section({"qkv_bias": True, **hf})


def _qwen_pattern(hf: Mapping[str, Any]) -> list[int]:
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = range(require(hf, "num_hidden_layers"))
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]


def _qwen3_decoder(hf: Mapping[str, Any]) -> dict[str, Any]:
    return decoder_section({**hf, "qk_norm": True})


def _olmoe_decoder(hf: Mapping[str, Any]) -> dict[str, Any]:
    if hf.get("clip_qkv") is not None:
        raise ConfigError(
            f"config.json: clip_qkv ({hf['clip_qkv']}) must be null: this package's decoder does "
            "not clip queries, keys and values; such a checkpoint cannot be upcycled"
        )
    # Its own default of the epsilon; norms of queries and keys are always there.
    fields = {"rms_norm_eps": 1e-5, **hf, "qk_norm": True, "qk_norm_scope": "all_heads"}
    return decoder_section(fields)


def _dense(model: Callable[[Mapping[str, Any]], dict[str, Any]]) -> SourceKind:
    return SourceKind(None, model, gate=None, experts="mlp")


_KINDS = {
    "llama": _dense(decoder_section),
    "qwen3": _dense(_qwen3_decoder),
    "mixtral": SourceKind(
        _mixtral_moe,
        decoder_section,
        gate="block_sparse_moe.gate",
        experts="block_sparse_moe.experts.{}",
        projections=("w1", "w3", "w2"),
    ),
    "olmoe": SourceKind(_softmax_moe, _olmoe_decoder),
    "qwen3_moe": SourceKind(_qwen3_moe, _qwen3_decoder),
    "qwen2_moe": SourceKind(_qwen2_moe, _qwen2_decoder, shared="mlp.shared_expert"),
    "deepseek_v3": SourceKind(
        deepseek_moe,
        deepseek_decoder_section,
        bias="mlp.gate.e_score_correction_bias",
        shared="mlp.shared_experts",
        attention=deepseek_attention,
    ),
}
