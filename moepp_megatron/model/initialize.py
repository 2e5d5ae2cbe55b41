"""Weights that do not depend on the layout.

Megatron draws each rank's shard from that rank's random stream, so two layouts start from two
models. Here every global tensor has its own random stream, seeded by the run's seed and the name
that the tensor has in checkpoints, and a rank keeps the part that its sharding metadata names. The
same seed gives the same model on one process and on any grid of ranks.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.fp8_utils import (
    copy_tensor_to_quantized_param,
    is_float8tensor,
)
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from moepp_megatron.moe.zero_computation import ZeroComputationExperts

# Weights that write into the residual stream; their scale shrinks with depth (GPT-2, section 2.3).
_RESIDUAL_PROJECTIONS = ("self_attention.linear_proj.weight", "linear_fc2.weight")


def initialize_weights(chunks: Iterable[LanguageModule], seed: int) -> None:
    """Initialise every parameter of this rank's model chunks, before any wrapper, in place.

    Matrices are drawn from N(0, init_method_std), projections into the residual stream from
    N(0, init_method_std / sqrt(number of such projections in depth)), norms are 1, biases 0,
    and constant experts' vectors 0 under `MoEPPConfig.constant_init` zero.
    """
    for chunk in chunks:
        config = chunk.config
        # A layer writes twice into the residual stream, in attention and in the FFN.
        branches = 2 * config.num_layers
        with _fp8_weights_as_plain(chunk):
            parameters = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
            for entry in nested_values(chunk.sharded_state_dict()):
                for tensor in _sharded_tensors(entry):
                    # Buffers, such as a router's selection bias, keep what they were built with.
                    if tensor.data.untyped_storage().data_ptr() in parameters:
                        _fill(tensor, seed, config.init_method_std, branches)
        for module in chunk.modules():
            if isinstance(module, ZeroComputationExperts) and module.starts_at_zero:
                torch.nn.init.zeros_(module.vectors)


def _sharded_tensors(entry: object) -> list[ShardedTensor]:
    """The sharded tensors behind one entry; views of parameters, so writing fills the parameter."""
    entries = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return [e for e in entries if isinstance(e, ShardedTensor) and e.data is not None]


@torch.no_grad()
def _fill(tensor: ShardedTensor, seed: int, std: float, branches: int) -> None:
    data = tensor.data
    if "norm" in tensor.key:
        data.fill_(1.0)
    elif tensor.key.endswith(".bias"):
        data.zero_()
    else:
        if tensor.key.endswith(_RESIDUAL_PROJECTIONS):
            std = std / math.sqrt(branches)
        data.copy_(_global_shard(tensor, seed) * std)


def _global_shard(tensor: ShardedTensor, seed: int) -> Tensor:
    """This rank's part of the fp32 normal tensor of (seed, key and expert's number)."""
    prepended = tensor.prepend_axis_num
    name = (tensor.key, *tensor.global_offset[:prepended])
    weight = seeded_noise(seed, name, tensor.global_shape[prepended:])
    offsets = tensor.global_offset[prepended:]
    for axis, (offset, length) in enumerate(zip(offsets, tensor.local_shape, strict=True)):
        weight = weight.narrow(axis, offset, length)
    return weight


def seeded_noise(seed: int, name: object, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, fp32, that depend only on seed and name."""
    digest = hashlib.sha256(repr((seed, name)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@contextmanager
def _fp8_weights_as_plain(model: torch.nn.Module) -> Iterator[None]:
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


@torch.no_grad()
def _write(parameter: torch.nn.Parameter, value: Tensor) -> None:
    copy_tensor_to_quantized_param(parameter, value)
    kept = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    if kept is not None:
        kept.copy_(value)
