"""Padding masks: which tokens a router does not route.

A mask is bool, True for padding, as in megatron-core: [b, s] on its way through the model, [s, b]
in a MoE++ layer, [T] inside of its router. A padded token selects nothing and counts nowhere.
"""

from __future__ import annotations

from torch import Tensor


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


def without_padding(logits: Tensor, padding_mask: Tensor | None) -> Tensor:
    """[s, b, E] logits with those of padding set to 0, so that later layers do not see them."""
    if padding_mask is None:
        return logits
    return logits.masked_fill(padding_mask.bool().unsqueeze(-1), 0.0)
