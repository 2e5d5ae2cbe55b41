"""Rules for LongCat-Flash's tensors (`longcat` says how the models correspond)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.interop.latent_rules import latent_attention_rules, norm_keys
from moepp_megatron.interop.longcat import dense_width, routed_experts
from moepp_megatron.interop.tensor_rules import HFTensor, TensorRule, made, same
from moepp_megatron.interop.upcycle_sources import expert_rules, source_kind, zero_expert_rules

_KIND = source_kind({"model_type": "deepseek_v3"})


def longcat_rules(config: Config) -> Iterator[TensorRule]:
    """Every tensor by LongCat-Flash's names, as transformers 5 asks for them."""
    model = config.model
    table = (model.vocab_size, model.hidden_size)
    names = ["model.embed_tokens.weight"] + ["lm_head.weight"] * model.tie_embeddings
    sources = tuple(HFTensor(name, table) for name in names)
    yield TensorRule(
        "embedding.word_embeddings.weight", table, sources, unpack=lambda t: [t] * len(names)
    )
    for layer, is_moe in enumerate(config.moe.moe_layer_pattern(model.num_layers)):
        yield from _layer_rules(config, layer, is_moe)
    yield same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size)
    if not model.tie_embeddings:
        yield same("output_layer.weight", "lm_head.weight", *table)


def _layer_rules(config: Config, layer: int, is_moe: bool) -> Iterator[TensorRule]:
    width, latent = config.model.hidden_size, config.model.latent_attention
    assert latent is not None, "another attention was refused"
    assert latent.q_lora_rank is not None, "and so were queries of the layer's input"
    theirs = f"model.layers.{layer}."
    q_scale, kv_scale = (
        math.sqrt(width / rank) for rank in (latent.q_lora_rank, latent.kv_lora_rank)
    )
    attention = list(
        latent_attention_rules(config, layer, theirs + "self_attn.0.", q_scale, kv_scale)
    )
    yield from attention
    for rule in attention:
        (source,) = rule.sources
        second = source.name.replace("self_attn.0.", "self_attn.1.")
        # Norms of zeros are zeros, whatever their weights.
        yield made(second, source.shape, 1.0 if "layernorm" in second else 0.0)
    for key, norm in zip(
        norm_keys(layer, is_moe), ("input_layernorm", "post_attention_layernorm"), strict=True
    ):
        yield same(key, f"{theirs}{norm}.0.weight", width)
        yield made(f"{theirs}{norm}.1.weight", (width,), 1.0)
    yield from _dense_rules(config, layer, is_moe)
    if is_moe:
        yield from _moe_rules(config, layer)
    else:
        yield from _no_moe_rules(config, layer)
    yield from _identity_weights(config, layer)


def _dense_rules(config: Config, layer: int, is_moe: bool) -> Iterator[TensorRule]:
    """The first dense FFN, which is the shared expert or the layer's FFN, and the second: zeros."""
    moe, width, wide = config.moe, config.model.hidden_size, dense_width(config)
    ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlps."
    shapes = {"gate_proj": (wide, width), "up_proj": (wide, width), "down_proj": (width, wide)}
    inner = moe.shared_expert_ffn_hidden_size if is_moe else config.model.ffn_hidden_size
    if is_moe:
        ours += "shared_experts."
    first = [HFTensor(f"{theirs}0.{name}.weight", shape) for name, shape in shapes.items()]
    if inner is None:
        yield from (made(tensor.name, tensor.shape) for tensor in first)
    else:
        more = wide - inner

        def gate_and_up(tensor: Tensor) -> list[Tensor]:
            return [torch.cat([t, t.new_zeros(more, width)]) for t in tensor.split(inner)]

        def down(tensor: Tensor) -> list[Tensor]:
            return [torch.cat([tensor, tensor.new_zeros(width, more)], dim=1)]

        shape = (2 * inner, width)
        yield TensorRule(ours + "linear_fc1.weight", shape, tuple(first[:2]), unpack=gate_and_up)
        yield TensorRule(ours + "linear_fc2.weight", (width, inner), (first[2],), unpack=down)
    yield from (made(f"{theirs}1.{name}.weight", shape) for name, shape in shapes.items())


def _moe_rules(config: Config, layer: int) -> Iterator[TensorRule]:
    moe, width = config.moe, config.model.hidden_size
    ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    router, total = theirs + "router.", moe.num_experts
    yield _reordered(ours + "router.weight", router + "classifier.weight", config, total, width)
    bias = router + "e_score_correction_bias"
    if moe.selection_bias:
        yield _reordered(ours + "router.expert_bias", bias, config, total)
    else:
        yield made(bias, (total,))
    layer_names = f"model.layers.{layer}."
    yield from expert_rules(_KIND, config, ours, layer_names)
    zeros = range(moe.num_ffn_experts, routed_experts(config))
    yield from zero_expert_rules(_KIND, config, layer_names, zeros)


def _no_moe_rules(config: Config, layer: int) -> Iterator[TensorRule]:
    """A MoE layer that returns 0: its bias makes tokens select only experts of zeros."""
    total, routed = config.moe.num_experts, routed_experts(config)
    router = f"model.layers.{layer}.mlp.router."
    yield made(router + "classifier.weight", (total, config.model.hidden_size))

    def bias(zeros: Tensor) -> list[Tensor]:
        ones = torch.ones_like(zeros)
        ones[routed:] = 0.0
        return [ones]

    rule = made(router + "e_score_correction_bias", (total,))
    yield TensorRule(rule.key, rule.shape, rule.sources, unpack=bias, unused=True)
    yield from zero_expert_rules(_KIND, config, f"model.layers.{layer}.", range(routed))


def _identity_weights(config: Config, layer: int) -> Iterator[TensorRule]:
    """Gate and up projections of identity experts, which transformers asks for and never uses."""
    shape = (config.expert_ffn_hidden_size, config.model.hidden_size)
    for index in range(routed_experts(config), config.moe.num_experts):
        prefix = f"model.layers.{layer}.mlp.experts.{index}."
        yield from (made(f"{prefix}{name}.weight", shape) for name in ("gate_proj", "up_proj"))


def _reordered(key: str, name: str, config: Config, *shape: int) -> TensorRule:
    """Reorder rows of experts: copy experts come before zero experts here, and after them there."""
    moe = config.moe
    counts = [moe.num_ffn_experts, moe.num_copy_experts, moe.num_zero_experts]
    back = [moe.num_ffn_experts, moe.num_zero_experts, moe.num_copy_experts]

    def exchanged(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
        ffn, second, third = tensor.split(list(sizes))
        return torch.cat([ffn, third, second])

    return TensorRule(
        key,
        shape,
        (HFTensor(name, shape),),
        None,
        lambda tensors: exchanged(tensors[0], back),
        lambda tensor: [exchanged(tensor, counts)],
    )
