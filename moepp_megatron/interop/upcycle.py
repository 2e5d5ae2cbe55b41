"""Mixtral, Qwen3-MoE, Llama and Qwen3 checkpoints become MoE++ models that compute the same.

Carried over: attention, norms, embeddings, FFN experts (or the one dense FFN, copied into every
expert: megatron-core's upcycling without its scaling, which renormalised gates do not need), router
rows. Added: zero-computation experts and gating residuals, so that step 0 is exact:

- Gates are the softmax over the selected logits in all these models, so with `selected` gates only
  the selection must not change; gating residuals G start at 0.
- New router rows are the mean w of the FFN rows plus small noise. The router's input is g * u with
  the norm's weight g and |u| <= sqrt(D), so a new logit exceeds the mean FFN logit by at most
  eta = |g * (w_new - w)| sqrt(D), and the mean's exponential is at most the mean of exponentials:
  no new score exceeds exp(eta) / F, for any token.
- A selection bias of that much on the FFN experts therefore keeps every new expert unselected.
  LongCat-Flash's rule (`moe.budget`) takes it back in training, at the rate at which
  the FFN share is above phi.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.interop.hf_config import assemble, decoder_section, require
from moepp_megatron.interop.hf_source import HFSource
from moepp_megatron.interop.rules import (
    HFTensor,
    Rule,
    Shape,
    attention_rules,
    decoder_rules,
    dense_mlp_rules,
    row,
    stacked,
)
from moepp_megatron.interop.to_mcore import write_checkpoint
from moepp_megatron.runtime.terminal import Console

DENSE_TYPES = ("llama", "qwen3")
MOE_TYPES = ("mixtral", "qwen3_moe")
# Of the noise on new rows: eta, the most by which it raises a logit over the mean FFN logit.
_NOISE = math.log(1.25)
# Rounding of scores and sums in fp32 is far below this.
_MARGIN = 1e-3


@dataclass(frozen=True)
class Additions:
    """What a checkpoint gains.

    Attributes:
        num_zero_experts: Experts that return 0.
        num_copy_experts: Experts that return their input.
        num_constant_experts: Experts that mix their input with a learned vector.
        gating_residual: Whether routers see the logits of the layer before.
        tau: Weight of zero-computation experts in the balance loss.
        bias_gain: `moe.budget.gain` of the selection bias in training.
        num_ffn_experts: FFN experts made of a dense FFN; a MoE checkpoint has its own.
        router_topk: Experts per token of a model made from a dense one; likewise.
        seed: Of all random numbers.
    """

    num_zero_experts: int = 1
    num_copy_experts: int = 1
    num_constant_experts: int = 2
    gating_residual: bool = True
    tau: float = 0.75
    bias_gain: float = 0.01
    num_ffn_experts: int = 8
    router_topk: int = 2
    seed: int = 1234


def upcycle(
    source: Path,
    target: Path,
    additions: Additions | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    console: Console | None = None,
) -> Config:
    """Convert a Mixtral, Qwen3-MoE, Llama or Qwen3 checkpoint into a MoE++ checkpoint of ours.

    Args:
        source: Its folder, in Hugging Face format.
        target: Folder to make; it must not exist or be empty.
        additions: What to add; the paper's experts where None.
        dtype: fp32 or bf16 for all weights; None keeps every tensor as it is.
        allow_pickle: Also accept pickled weights.
        console: Where progress goes.

    Returns:
        The configuration of the new model.

    Raises:
        ConfigError: For a model whose function cannot be kept, or a damaged checkpoint.
    """
    additions = additions or Additions()
    hf = HFSource(source, allow_pickle)
    config = upcycled_config(hf.config, additions, source.resolve().name, dtype)
    rules = list(upcycling_rules(config, hf.config, additions.seed))
    write_checkpoint(hf, rules, config, target, dtype, console)
    return config


def upcycled_config(
    hf: Mapping[str, Any], additions: Additions, name: str, dtype: str | None
) -> Config:
    """The configuration of the MoE++ model that a checkpoint becomes.

    Raises:
        ConfigError: For a model whose function cannot be kept.
    """
    kind = hf.get("model_type")
    if kind not in MOE_TYPES + DENSE_TYPES:
        raise ConfigError(
            f"config.json: model_type ({kind}) must be one of "
            f"{', '.join(MOE_TYPES + DENSE_TYPES)}; other models cannot be upcycled"
        )
    layers = set(hf.get("layer_types") or ["full_attention"])
    if layers != {"full_attention"}:
        raise ConfigError(
            f"config.json: layer_types ({', '.join(sorted(layers))}) must all be full_attention; "
            "such a checkpoint cannot be converted"
        )
    experts = _source_experts(hf, additions)
    _refuse_one_expert(experts["router_topk"], kind)
    model = decoder_section({**hf, "qk_norm": kind in ("qwen3", "qwen3_moe")})
    moe = {
        "num_zero_experts": additions.num_zero_experts,
        "num_copy_experts": additions.num_copy_experts,
        "num_constant_experts": additions.num_constant_experts,
        "gating_residual": additions.gating_residual,
        "tau": additions.tau,
        "gate_normalization": "selected",
        "selection_bias": True,
        "budget": {"controller": "bias", "gain": additions.bias_gain},
        **experts,
    }
    return assemble(model, moe, hf, name, dtype)


def _refuse_one_expert(topk: int, kind: str) -> None:
    """Say so by the name that the user gave, not by a setting of ours that upcycling fixes."""
    if topk > 1:
        return
    what, remedy = "config.json: num_experts_per_tok (1)", "such a checkpoint cannot be upcycled"
    if kind in DENSE_TYPES:
        what, remedy = "--topk (1)", "use --topk 2"
    raise ConfigError(
        f"{what} must be at least 2, because an upcycled model divides gates by their sum, and one "
        f"gate divided by itself gives the router no gradient; {remedy}"
    )


def _source_experts(hf: Mapping[str, Any], additions: Additions) -> dict[str, Any]:
    """Fields of the `moe` section that the source decides."""
    if hf["model_type"] in DENSE_TYPES:
        return {
            "num_ffn_experts": additions.num_ffn_experts,
            "router_topk": additions.router_topk,
        }
    count = hf.get("num_local_experts") or require(hf, "num_experts")
    fields = {"num_ffn_experts": count, "router_topk": require(hf, "num_experts_per_tok")}
    if hf["model_type"] == "qwen3_moe":
        if not hf.get("norm_topk_prob", False):
            raise ConfigError(
                "config.json: norm_topk_prob (false) must be true: scores that are not divided by "
                "their sum shrink with every expert that is added; such a checkpoint cannot be "
                "upcycled exactly"
            )
        fields["ffn_hidden_size"] = require(hf, "moe_intermediate_size")
        fields["layer_freq"] = _qwen_pattern(hf)
    return fields


def _qwen_pattern(hf: Mapping[str, Any]) -> list[int]:
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = range(require(hf, "num_hidden_layers"))
    return [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]


def upcycling_rules(config: Config, hf: Mapping[str, Any], seed: int) -> Iterator[Rule]:
    """How every tensor of the MoE++ model comes from the source, or from nothing."""
    kind = hf["model_type"]
    pattern = config.moe.moe_layer_pattern(config.model.num_layers)
    experts = {"mixtral": _mixtral_experts, "qwen3_moe": _qwen_experts}.get(kind, _copied_ffn)
    gate = {"mixtral": "block_sparse_moe.gate", "qwen3_moe": "mlp.gate"}.get(kind)
    yield from decoder_rules(config)
    for layer, is_moe in enumerate(pattern):
        yield from attention_rules(config, layer)
        if not is_moe:
            yield from dense_mlp_rules(config, layer)
            continue
        ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
        yield from experts(config, ours + "experts.experts.", theirs)
        yield from _router_rules(config, ours + "router.", theirs, gate, seed)
        yield from _added_rules(config, ours, layer > pattern.index(True), seed)


def _mixtral_experts(config: Config, ours: str, theirs: str) -> Iterator[Rule]:
    prefix = theirs + "block_sparse_moe.experts."
    yield from _expert_rules(config, ours, prefix + "{}.", ("w1.weight", "w3.weight"), "w2.weight")


def _qwen_experts(config: Config, ours: str, theirs: str) -> Iterator[Rule]:
    gate_up = ("gate_proj.weight", "up_proj.weight")
    yield from _expert_rules(config, ours, theirs + "mlp.experts.{}.", gate_up, "down_proj.weight")


def _copied_ffn(config: Config, ours: str, theirs: str) -> Iterator[Rule]:
    gate_up = ("gate_proj.weight", "up_proj.weight")
    yield from _expert_rules(config, ours, theirs + "mlp.", gate_up, "down_proj.weight")


def _expert_rules(
    config: Config, ours: str, prefix: str, gate_up: Sequence[str], down: str
) -> Iterator[Rule]:
    width, inner = config.model.hidden_size, config.expert_ffn_hidden_size
    count = config.moe.num_ffn_experts
    for index in range(count):
        source = prefix.format(index)
        names = [source + name for name in gate_up]
        yield stacked(ours + "linear_fc1.weight", names, inner, width, (count, index))
        yield row(ours + "linear_fc2.weight", count, index, source + down, width, inner)


def _router_rules(
    config: Config, ours: str, theirs: str, gate: str | None, seed: int
) -> Iterator[Rule]:
    """Router rows, and the selection bias that they need."""
    moe, width = config.moe, config.model.hidden_size
    sources = [HFTensor(theirs + "post_attention_layernorm.weight", (width,))]
    if gate is not None:
        sources.append(HFTensor(f"{theirs}{gate}.weight", (moe.num_ffn_experts, width)))
    shape = (moe.num_experts, width)

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        norm = tensors[0]
        if gate is None:
            std = config.model.init_method_std
            ffn = std * noise(seed, ours + "ffn", (moe.num_ffn_experts, width))
            ffn = ffn.to(norm.dtype)
        else:
            ffn = tensors[1]
        added = noise(seed, ours + "added", (moe.num_zero_computation_experts, width))
        return torch.cat([ffn, new_rows(ffn, norm, added)])

    def bias(tensors: Sequence[Tensor]) -> Tensor:
        return selection_bias(rows(tensors), tensors[0], moe.num_ffn_experts)

    yield Rule(ours + "weight", shape, tuple(sources), None, rows, None)
    yield Rule(ours + "expert_bias", (moe.num_experts,), tuple(sources), None, bias, None)


def new_rows(ffn: Tensor, norm: Tensor, directions: Tensor) -> Tensor:
    """Router rows of added experts: the mean FFN row, and noise so that they differ.

    Args:
        ffn: [F, D] router rows of the FFN experts.
        norm: [D] weight of the norm before the router.
        directions: [Z, D] random directions.

    Returns:
        [Z, D], dtype of `ffn`.
    """
    lengths = (norm.double() * directions.double()).norm(dim=-1, keepdim=True)
    scale = _NOISE / (lengths * math.sqrt(norm.numel())).clamp(min=1e-30)
    return (ffn.double().mean(dim=0) + scale * directions.double()).to(ffn.dtype)


def selection_bias(rows: Tensor, norm: Tensor, num_ffn_experts: int) -> Tensor:
    """[E] fp32: the bias on FFN experts above any score that an added expert can have."""
    bias = torch.zeros(rows.shape[0])
    if rows.shape[0] == num_ffn_experts:
        return bias
    ffn, added = rows.double().split([num_ffn_experts, rows.shape[0] - num_ffn_experts])
    above_mean = norm.double() * (added - ffn.mean(dim=0))
    eta = float(above_mean.norm(dim=-1).max()) * math.sqrt(norm.numel())
    bias[:num_ffn_experts] = math.exp(eta) / num_ffn_experts * (1.0 + _MARGIN)
    return bias


def _added_rules(config: Config, ours: str, has_residual: bool, seed: int) -> Iterator[Rule]:
    """What has no source: gating residuals and constant experts."""
    moe, width, std = config.moe, config.model.hidden_size, config.model.init_method_std
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]

    def made(key: str, shape: Shape, scale: float) -> Rule:
        def value(_: Sequence[Tensor]) -> Tensor:
            return (scale * noise(seed, ours + key, shape)).to(dtype)

        return Rule(ours + key, shape, (), None, value, None)

    if moe.gating_residual and has_residual:
        yield made("router.residual_weight", (moe.num_experts, moe.num_experts), 0.0)
    if moe.num_constant_experts > 0:
        yield made("zero_computation.constants", (moe.num_constant_experts, width), std)
        yield made("zero_computation.mixing_weight", (moe.num_constant_experts, 2, width), std)


def noise(seed: int, name: str, shape: Shape) -> Tensor:
    """Standard normal numbers, fp32, that depend on seed and name alone."""
    digest = hashlib.sha256(repr((seed, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
