"""Exports models with latent attention as LongCat-Flash (`longcat_flash`, arXiv 2509.01322).

A layer of LongCat-Flash has two attentions and two dense FFNs, and a MoE layer beside the second
half. Norms are n and p:

    h1 = h  + A0(n0(h))       h2 = h1 + F0(p0(h1))       s = MoE(p0(h1))
    h3 = h2 + A1(n1(h2))      h' = h3 + F1(p1(h3)) + s

With A1 = 0 and F1 = 0 that is h1 + F0(p0(h1)) + MoE(p0(h1)): a MoE layer of ours, F0 being its
shared expert, or a dense layer of ours, F0 being its FFN and MoE's selected experts all 0. So each
of our layers becomes one of theirs whose second half is zeros. Zero experts, which LongCat-Flash
does not have, become FFN experts of zeros; copy experts are its identity experts.

Plain attention cannot be written as latent attention: there all heads share one rotated key, and
here each key/value head has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.config.problem import Problem, raise_problems
from moepp_megatron.experts import COPY, ZERO
from moepp_megatron.interop.expressible import Row, refusals, unknown_there
from moepp_megatron.interop.hf_config import shared_fields
from moepp_megatron.interop.latent_rules import epsilon_warnings, latent_fields

_RULES: tuple[Row, ...] = (
    *unknown_there((COPY, ZERO)),
    ("moe.score_function", ("softmax",), "scores are softmax probabilities there"),
    ("moe.shared_expert_gate", (False,), "its dense FFNs have no gate"),
    ("moe.gate_normalization", ("none",), "LongCat-Flash keeps the raw scores"),
)
_LATENT_RULES: tuple[Row, ...] = (
    ("model.latent_attention.rope_type", ("rope",), "positions are not stretched there"),
    ("model.qk_layernorm", (True,), "it normalises compressed vectors"),
)
# Inner width of the dense FFNs where the model has none: they are zeros.
_LEAST_WIDTH = 128


def longcat_hf_config(config: Config) -> dict[str, Any]:
    """LongCat-Flash's `config.json`.

    ConfigError names each reason why LongCat-Flash cannot express the model.
    """
    raise_problems(_problems(config))
    model, moe, latent = config.model, config.moe, config.model.latent_attention
    assert latent is not None, "another attention was refused"
    fields = shared_fields(config)
    del fields["num_hidden_layers"], fields["intermediate_size"]
    return fields | {
        "model_type": "longcat_flash",
        "architectures": ["LongcatFlashForCausalLM"],
        "attention_method": "MLA",
        "num_layers": model.num_layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        **latent_fields(config),
        "ffn_hidden_size": dense_width(config),
        "expert_ffn_hidden_size": config.expert_ffn_hidden_size,
        "qk_head_dim": latent.qk_dim,
        "head_dim": latent.qk_pos_emb_head_dim,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "n_routed_experts": routed_experts(config),
        "zero_expert_num": moe.num_copy_experts,
        "zero_expert_type": "identity",
        "moe_topk": moe.router_topk,
        "norm_topk_prob": False,
        "routed_scaling_factor": moe.gate_scale,
        "router_bias": False,
        # Tied models are written with two tensors.
        "tie_word_embeddings": False,
    }


def longcat_warnings(config: Config) -> Iterator[str]:
    """Warnings about errors of known programs, and about costs of the format."""
    zeros = config.moe.num_zero_experts
    yield (
        "LongCat-Flash's layers hold two attentions: the second is zeros here, and its part of the "
        "key/value cache is taken all the same"
    )
    if zeros:
        yield (
            f"moe.num_zero_experts ({zeros}): zero experts became FFN experts of "
            "zeros, which cost what FFN experts cost"
        )
    yield from epsilon_warnings(config)


def _problems(config: Config) -> Iterator[Problem]:
    moe, latent = config.moe, config.model.latent_attention
    ours = "use --layout moepp"
    if latent is None:
        rule = (
            "must be given for --layout longcat: its attention is latent, one rotated key for all"
        )
        yield Problem("model.latent_attention", None, rule, ours)
    else:
        # Without latent attention `moepp` is the way out; only this layout and `zeda` have it.
        ours = "LongCat-Flash cannot express it"
        if latent.q_lora_rank is None:
            rule = "must be a width for --layout longcat: queries are compressed there"
            yield Problem("model.latent_attention.q_lora_rank", None, rule, ours)
        yield from refusals(config, _LATENT_RULES, "--layout longcat", ours)
    yield from refusals(config, _RULES, "--layout longcat", ours)
    is_dense = not all(moe.moe_layer_pattern(config.model.num_layers))
    if is_dense and moe.router_topk > routed_experts(config):
        rule = (
            f"must be at most the FFN and zero experts ({routed_experts(config)}) for --layout "
            "longcat with dense layers: their tokens select experts of zeros"
        )
        yield Problem("moe.router_topk", moe.router_topk, rule, ours)


def routed_experts(config: Config) -> int:
    """Number of FFN experts in the export: our FFN experts plus zero experts."""
    return config.moe.num_ffn_experts + config.moe.num_zero_experts


def dense_width(config: Config) -> int:
    """Inner width of a layer's two dense FFNs: the widest that the model has."""
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    widths = [config.moe.shared_expert_ffn_hidden_size or 0] if any(pattern) else []
    widths += [] if all(pattern) else [config.model.ffn_hidden_size]
    return max(widths) or _LEAST_WIDTH
