"""Padding masks: which tokens a router does not route.

A mask is bool, True for padding, as in megatron-core: [b, s] on its way through the model, [s, b]
in a MoE++ layer, [T] inside of its router. A padded token selects nothing and counts nowhere.
"""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup


def flat_mask(padding_mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The padding mask [s, b] of `tokens` [s, b, ...] as [T] bool; None for None."""
    if padding_mask is None:
        return None
    if padding_mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"padding_mask {tuple(padding_mask.shape)} must have a value for each of the "
            f"{tuple(tokens.shape[:2])} local tokens [s, b]; give each rank the mask of its tokens"
        )
    return padding_mask.reshape(-1).bool()


def local_mask(
    padding_mask: Tensor, tokens: Tensor, config: TransformerConfig, tp_group: ProcessGroup
) -> Tensor:
    """This rank's part of a mask, which megatron-core cuts on the first pipeline stage only.

    `padding_mask` is [s, b] of the local `tokens` [s, b, ...], or with sequence parallelism of
    those of all tensor-parallel ranks.
    """
    if config.sequence_parallel and len(padding_mask) == len(tokens) * tp_group.size():
        return padding_mask.chunk(tp_group.size())[tp_group.rank()]
    return padding_mask
