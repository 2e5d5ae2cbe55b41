"""The new parameters of an upcycled model: router rows, biases, constant experts.

New router rows are the mean w of the FFN rows plus small noise. The selection bias then keeps every
new expert unselected, for any token:

- Softmax: the router's input is g * u with the norm's weight g and |u| <= sqrt(D), so a new logit
  exceeds the mean FFN logit by at most eta = |g * (w_new - w)| sqrt(D), and the mean's exponential
  is at most the mean of exponentials: no new score exceeds exp(eta) / F, which the bias adds to FFN
  experts.
- Sigmoid: scores lie between 0 and 1, so a bias of 1 below the least of the FFN experts' own is
  enough.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.interop.tensor_rules import HFTensor, Shape, TensorRule

# Of the noise on new rows: eta, the most by which it raises a logit over the mean FFN logit.
NOISE = math.log(1.25)
# Rounding of scores and sums in fp32 is far below this.
_MARGIN = 1e-3


def router_rules(
    config: Config, ours: str, theirs: str, gate: str | None, bias: str | None, seed: int
) -> Iterator[TensorRule]:
    """Router rows, and the selection bias that they need.

    Args:
        config: Configuration of the new model.
        ours: Beginning of our names.
        theirs: Beginning of the source's names of this layer.
        gate: Name of the source's router; None for a dense source.
        bias: Name of the source's selection bias, or None.
        seed: Seed of the noise.
    """
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
        if not moe.selection_bias:
            # Of the FFN rows' own mean and deviation.
            return torch.cat([ffn, (ffn.mean(dim=0) + ffn.std(dim=0) * added).to(ffn.dtype)])
        return torch.cat([ffn, new_rows(ffn, norm, added)])

    def softmax_bias(tensors: Sequence[Tensor]) -> Tensor:
        return selection_bias(rows(tensors), tensors[0], moe.num_ffn_experts)

    def sigmoid_bias(tensors: Sequence[Tensor]) -> Tensor:
        (ffn_bias,) = tensors
        least = float(ffn_bias.min()) - 1.0 - _MARGIN
        return torch.cat([ffn_bias.float(), torch.full((moe.num_zero_computation_experts,), least)])

    yield TensorRule(ours + "weight", shape, tuple(sources), None, rows, None)
    if not moe.selection_bias:
        return
    key = ours + "expert_bias"
    # What keeps added experts from being selected depends on the scores.
    match moe.score_function, bias:
        case "softmax", None:
            yield TensorRule(key, (moe.num_experts,), tuple(sources), None, softmax_bias, None)
        case "sigmoid", str():
            own = (HFTensor(theirs + bias, (moe.num_ffn_experts,)),)
            yield TensorRule(key, (moe.num_experts,), own, None, sigmoid_bias, None)
        case other:
            raise AssertionError(f"added experts have no bias for (scores, bias) of {other}")


def new_rows(ffn: Tensor, norm: Tensor, directions: Tensor) -> Tensor:
    """[Z, D] router rows of added experts, dtype of `ffn`: the mean FFN row, and noise.

    Args:
        ffn: [F, D] router rows of the FFN experts.
        norm: [D] weight of the norm before the router.
        directions: [Z, D] random directions.
    """
    lengths = (norm.double() * directions.double()).norm(dim=-1, keepdim=True)
    scale = NOISE / (lengths * math.sqrt(norm.numel())).clamp(min=1e-30)
    return (ffn.double().mean(dim=0) + scale * directions.double()).to(ffn.dtype)


def selection_bias(rows: Tensor, norm: Tensor, num_ffn_experts: int) -> Tensor:
    """[E] fp32: the bias on FFN experts above any score that an added expert can have."""
    bias = torch.zeros(rows.shape[0])
    ffn, added = rows.double().split([num_ffn_experts, rows.shape[0] - num_ffn_experts])
    above_mean = norm.double() * (added - ffn.mean(dim=0))
    eta = float(above_mean.norm(dim=-1).max()) * math.sqrt(norm.numel())
    bias[:num_ffn_experts] = math.exp(eta) / num_ffn_experts * (1.0 + _MARGIN)
    return bias


def added_rules(config: Config, ours: str, has_residual: bool, seed: int) -> Iterator[TensorRule]:
    """Yield new tensors: gating residuals and zero-computation experts."""
    moe, width, std = config.moe, config.model.hidden_size, config.model.init_method_std
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision.dtype]

    def made(key: str, shape: Shape, scale: float) -> TensorRule:
        def value(_: Sequence[Tensor]) -> Tensor:
            return (scale * noise(seed, ours + key, shape)).to(dtype)

        return TensorRule(ours + key, shape, (), None, value, None)

    if moe.gating_residual and has_residual:
        yield made("router.residual_weight", (moe.num_experts, moe.num_experts), 0.0)
    for name, shape in moe.local_weights(width):
        yield made(f"zero_computation.{name}", shape, std)


def noise(seed: int, name: str, shape: Shape) -> Tensor:
    """Standard normal numbers, fp32, that depend on seed and name alone."""
    digest = hashlib.sha256(repr((seed, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
