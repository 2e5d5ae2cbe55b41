"""Turns checkpoints of other models into MoE++ models that compute the same.

Carried over: attention, norms, embeddings, FFN experts (or the one dense FFN, copied into every
expert: megatron-core's upcycling without its scaling, which renormalised gates do not need), shared
experts, router rows. Added: zero-computation experts and gating residuals, so that step 0 is exact:

- Gates are shares of the selected experts' scores, so with `selected` gates only the selection must
  not change; gating residuals G start at 0. Where gates are raw softmax scores (norm_topk_prob
  false) new experts shrink them, by a bounded factor: that takes `Additions.approximate`.
- A selection bias keeps every new expert unselected, for any token.
  `moe.budget` takes it back in training.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.experts import LOCAL_KINDS, ExpertCounts
from moepp_megatron.interop.hf_config import assemble, require
from moepp_megatron.interop.hf_source import HFSource
from moepp_megatron.interop.tensor_rules import Fields, Rules, Shape, TensorRule
from moepp_megatron.interop.to_mcore import write_checkpoint
from moepp_megatron.interop.upcycle_sources import SourceKind
from moepp_megatron.layer_settings import LayerSettings
from moepp_megatron.model.initialize import seeded_noise
from moepp_megatron.model.megatron_config import params_dtype
from moepp_megatron.runtime.terminal import Console

# Of the noise on new rows: eta, the most by which it raises a logit over the mean FFN logit.
_NOISE = math.log(1.25)
# Rounding of scores and sums in fp32 is far below this.
_MARGIN = 1e-3
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _router_rules(
    config: Config, ours: str, theirs: str, gate: str | None, bias: str | None, seed: int
) -> Rules:
    """Make rules of router rows and of the selection bias; `gate` is None for a dense source."""
    moe, width = config.moe, config.model.hidden_size
    sources: dict[str, Shape] = {theirs + "post_attention_layernorm.weight": (width,)}
    if gate is not None:
        sources[f"{theirs}{gate}.weight"] = (moe.num_ffn_experts, width)
    shape = (moe.num_experts, width)

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        norm = tensors[0]
        if gate is None:
            std = config.model.init_method_std
            ffn = std * seeded_noise(seed, ours + "ffn", (moe.num_ffn_experts, width))
            ffn = ffn.to(norm.dtype)
        else:
            ffn = tensors[1]
        added = seeded_noise(seed, ours + "added", (moe.num_zero_computation_experts, width))
        if not moe.selection_bias:
            # Of the FFN rows' own mean and deviation.
            return torch.cat([ffn, (ffn.mean(dim=0) + ffn.std(dim=0) * added).to(ffn.dtype)])
        return torch.cat([ffn, _new_rows(ffn, norm, added)])

    def softmax_bias(tensors: Sequence[Tensor]) -> Tensor:
        return _selection_bias(rows(tensors), tensors[0], moe.num_ffn_experts)

    def sigmoid_bias(tensors: Sequence[Tensor]) -> Tensor:
        (ffn_bias,) = tensors
        least = float(ffn_bias.min()) - 1.0 - _MARGIN
        return torch.cat([ffn_bias.float(), torch.full((moe.num_zero_computation_experts,), least)])

    yield TensorRule(ours + "weight", shape, sources, None, rows, None)
    if not moe.selection_bias:
        return
    # What keeps added experts from being selected depends on the scores.
    match moe.score_function, bias:
        case "softmax", None:
            pack = softmax_bias
        case "sigmoid", str():
            sources, pack = {theirs + bias: (moe.num_ffn_experts,)}, sigmoid_bias
        case other:
            raise AssertionError(f"added experts have no bias for (scores, bias) of {other}")
    yield TensorRule(ours + "expert_bias", (moe.num_experts,), sources, None, pack, None)


def _new_rows(ffn: Tensor, norm: Tensor, directions: Tensor) -> Tensor:
    """Make [Z, D] router rows of added experts, dtype of `ffn`: the mean FFN row, and noise."""
    lengths = (norm.double() * directions.double()).norm(dim=-1, keepdim=True)
    scale = _NOISE / (lengths * math.sqrt(norm.numel())).clamp(min=1e-30)
    return (ffn.double().mean(dim=0) + scale * directions.double()).to(ffn.dtype)


def _selection_bias(rows: Tensor, norm: Tensor, num_ffn_experts: int) -> Tensor:
    """[E] fp32: the bias on FFN experts above any score that an added expert can have."""
    bias = torch.zeros(rows.shape[0])
    ffn, added = rows.double().tensor_split([num_ffn_experts])
    above_mean = norm.double() * (added - ffn.mean(dim=0))
    eta = float(above_mean.norm(dim=-1).max()) * math.sqrt(norm.numel())
    bias[:num_ffn_experts] = math.exp(eta) / num_ffn_experts * (1.0 + _MARGIN)
    return bias


def _added_rules(config: Config, ours: str, has_residual: bool, seed: int) -> Rules:
    """Yield new tensors: gating residuals and zero-computation experts."""
    moe, width, std = config.moe, config.model.hidden_size, config.model.init_method_std
    dtype = params_dtype(config)

    def made(key: str, shape: Shape, scale: float) -> TensorRule:
        def value(_: Sequence[Tensor]) -> Tensor:
            return (scale * seeded_noise(seed, ours + key, shape)).to(dtype)

        return TensorRule(ours + key, shape, {}, None, value, None)

    if moe.gating_residual and has_residual:
        yield made("router.residual_weight", (moe.num_experts, moe.num_experts), 0.0)
    for name, shape in moe.local_weights(width):
        yield made(f"zero_computation.{name}", shape, std)


@dataclass(frozen=True, kw_only=True)
class Additions(ExpertCounts):
    """Additions to a checkpoint; FFN experts are made of a dense FFN, a MoE has its own.

    Attributes:
        router_topk: Experts per token of a model made from a dense one.
        approximate: Whether to accept sources whose gates are raw scores, which new experts shrink.
        keeps_function: Whether a bias keeps new experts unselected at first. Without one they
            compete from the first step on, with the rows of ZEDA's scripts/convert-hf-to-ZCE.py.
    """

    gating_residual: bool = LayerSettings.gating_residual
    tau: float = LayerSettings.tau
    router_topk: int = LayerSettings.router_topk
    seed: int = 1234
    approximate: bool = False
    keeps_function: bool = True


def upcycle(
    source: Path,
    target: Path,
    additions: Additions | None = None,
    dtype: str | None = None,
    allow_pickle: bool = False,
    console: Console | None = None,
) -> Config:
    """Convert a checkpoint of one of `upcycle_sources.KINDS` into a MoE++ checkpoint of ours.

    `additions` None adds the paper's experts; the other arguments are those of
    `to_mcore.hf_to_mcore`. Raise ConfigError if the model's function cannot be kept, or the
    checkpoint is damaged.
    """
    additions = additions or Additions()
    hf = HFSource(source, allow_pickle)
    config = _upcycled_config(hf.config, additions, source.resolve().name, dtype)
    hf.leave_out(_extra_tensors(hf.config, hf.tensors))
    kind, seed = SourceKind.of(hf.config), additions.seed
    first = config.moe.moe_layer_pattern(config.model.num_layers).index(True)

    def router(layer: int, ours: str, theirs: str) -> Rules:
        yield from _router_rules(config, ours + "router.", theirs, kind.gate, kind.bias, seed)
        yield from _added_rules(config, ours, layer > first, seed)

    rules = list(kind.rules(config, router))
    write_checkpoint(hf, rules, config, target, dtype, console)
    return config


def _extra_tensors(hf: Fields, names: Iterable[str]) -> list[str]:
    """Layers of multi-token prediction, which come behind the decoder's (DeepSeek-V3)."""
    if "kv_lora_rank" not in hf:
        return []
    layers = require(hf, "num_hidden_layers")
    matches = ((name, _LAYER.match(name)) for name in names)
    return [name for name, match in matches if match is not None and int(match[1]) >= layers]


def _upcycled_config(hf: Fields, additions: Additions, name: str, dtype: str | None) -> Config:
    """The configuration of the MoE++ model; ConfigError if its function cannot be kept."""
    kind = SourceKind.of(hf)
    keeps_apart = additions.num_zero_computation_experts > 0 and additions.keeps_function
    moe = {
        **{kind.setting: additions.count(kind) for kind in LOCAL_KINDS},
        "gating_residual": additions.gating_residual,
        "tau": additions.tau,
        "gate_normalization": "selected",
        "selection_bias": keeps_apart or kind.bias is not None,
    }
    if not additions.keeps_function and kind.bias is not None:
        raise ConfigError(
            f"--zeda-router must be left out for a {hf['model_type']}, whose selection bias would "
            "keep new experts unselected"
        )
    if keeps_apart:
        moe["budget"] = {"controller": "bias"}
    if kind.moe is None:
        moe |= {"num_ffn_experts": additions.num_ffn_experts, "router_topk": additions.router_topk}
    else:
        moe |= kind.moe(hf)
    if moe["router_topk"] == 1 and moe["gate_normalization"] == "selected":
        _refuse_one_expert(is_dense=kind.moe is None)
    config = assemble(kind.model(hf), moe, hf, name, dtype)
    if not additions.approximate:
        _refuse_shrinking_gates(config)
    return config


def _refuse_one_expert(is_dense: bool) -> None:
    """Refuse one expert per token by the user's name of the setting, not by one of ours."""
    what, remedy = "config.json: num_experts_per_tok (1)", "such a checkpoint cannot be upcycled"
    if is_dense:
        what, remedy = "--topk (1)", "use --topk 2"
    raise ConfigError(
        f"{what} must be at least 2, because an upcycled model divides gates by their sum, and one "
        f"gate divided by itself gives the router no gradient; {remedy}"
    )


def least_gate(config: Config) -> float:
    """The least factor on an FFN expert's gate: 1, or less if gates are raw scores.

    Those are exponentials over their sum, to which each new expert adds at most exp(_NOISE) times
    the mean of the FFN experts'.
    """
    moe = config.moe
    if moe.gate_normalization != "none":
        return 1.0
    added = math.exp(_NOISE) * moe.num_zero_computation_experts
    return moe.num_ffn_experts / (moe.num_ffn_experts + added)


def _refuse_shrinking_gates(config: Config) -> None:
    least, count = least_gate(config), config.moe.num_zero_computation_experts
    if least < 1.0:
        raise ConfigError(
            "config.json: norm_topk_prob (false) must be true: scores that are not divided by "
            f"their sum shrink with every expert that is added, with {count} of them to no less "
            f"than {least:.3f} of what they were; use moepp convert upcycle --approximate if that "
            "will do, or add none (--zero 0 --copy 0 --constant 0)"
        )
