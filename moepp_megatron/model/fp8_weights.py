"""Weights that exist only in FP8 (`precision.fp8_param`), used as if they were plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.fp8_utils import (
    copy_tensor_to_quantized_param,
    dequantize_fp8_tensor,
    is_float8tensor,
)
from torch import Tensor


@contextmanager
def fp8_weights_as_plain(model: torch.nn.Module) -> Iterator[None]:
    """Make every FP8 weight in the block a plain, writable parameter of its dtype.

    A part of an FP8 weight cannot be written by itself, because the values of a block, or of the
    whole tensor, share a scale: a half of a gated FFN's weight is such a part, and so is what a
    checkpoint calls a tensor. At the end each weight is quantised once, and the value that
    Transformer Engine keeps for the optimizer's fp32 copy is replaced too
    (`get_high_precision_init_val`): otherwise the first step would bring back the old weight.
    """
    exchanged = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_float8tensor(parameter):
                plain = torch.nn.Parameter(
                    torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                )
                module._parameters[name] = plain
                exchanged.append((module, name, parameter, plain))
    try:
        yield
    finally:
        for module, name, parameter, plain in exchanged:
            module._parameters[name] = parameter
            _write(parameter, plain.detach())


def plain_value(tensor: Tensor) -> Tensor:
    """The values of a weight, in FP8 or not, as a plain tensor of its dtype."""
    return dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor


@torch.no_grad()
def _write(parameter: torch.nn.Parameter, value: Tensor) -> None:
    copy_tensor_to_quantized_param(parameter, value)
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if kept is not None:
        kept.copy_(value)
