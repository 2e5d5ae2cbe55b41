"""Causal attention on a GPU without Transformer Engine, for megatron-core's local modules.

megatron-core's own `DotProductAttention` writes the scores of all pairs of tokens and keeps them
for the backward pass: 4 bytes * heads * s^2 a sequence and layer (two 16-bit matrices). torch's
`scaled_dot_product_attention` has kernels that never write them.

Shape suffixes as in `attention.py`.
"""

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CausalAttention(MegatronModule):
    """Core attention of a layer whose sequences are whole on this rank.

    `softmax_scale` is 1 / sqrt(d) where None. Unused are groups, dropout and the widths of heads,
    which the tensors have. ValueError if the mask is not causal.
    """

    @staticmethod
    def suits(config: TransformerConfig) -> bool:
        """True if this class can replace `DotProductAttention` on this GPU."""
        return (
            torch.cuda.is_available()
            and config.context_parallel_size == 1
            and config.attention_dropout == 0.0
            and config.window_size is None
            and config.softmax_type == "vanilla"
            and not config.qk_clip
            and not config.apply_query_key_layer_scaling
        )

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **unused: object,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal:
            raise ValueError(
                f"attn_mask_type ({attn_mask_type}) must be causal with CausalAttention; use "
                "Transformer Engine"
            )
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend from each token to all tokens up to it: [S, b, n * v], dtype of `query`.

        Args:
            query: [S, b, n, d], the last S of s tokens (all of them in training).
            key: [s, b, g, d]; n is a multiple of g.
            value: [s, b, g, v].
            attention_mask: [b, 1, S, s] bool, True where a query must not see a key, later keys
                included (`document_attention.dense_mask`); None is the causal mask.
            attn_mask_type: Unused; the constructor's value decides.

        Raises:
            ValueError: If there is a bias or packed sequences.
        """
        refuse_unused(
            type(self).__name__, attention_bias=attention_bias, packed_seq_params=packed_seq_params
        )
        last, num_tokens = query.shape[0], key.shape[0]
        mask = None if attention_mask is None else ~attention_mask
        if mask is None and 1 < last < num_tokens:
            # Behind tokens whose keys are kept already.
            positions = torch.arange(num_tokens, device=query.device)
            mask = positions[-last:].unsqueeze(1) >= positions
        if value.requires_grad:
            # Values are a view of the projection's output, all of which would stay until the
            # backward pass, although rotation has made new queries and keys.
            value = value.contiguous()
        is_causal = mask is None and 1 < last == num_tokens
        context = attend(query, key, value, mask, self.softmax_scale, is_causal=is_causal)
        return context.flatten(start_dim=2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    """[S, b, n, v] attention by torch's kernels, which do not write the scores; dtype of `query`.

    `query` is [S, b, n, d], `key` [s, b, g, d] (n is a multiple of g), `value` [s, b, g, v]; `mask`
    [S, s] or [b, 1, S, s] bool, True where a query sees a key. `scale` is 1 / sqrt(d) where None.
    With `is_causal` a query sees the keys up to its position; S is s, and there is no mask.
    """
    repeats = query.shape[2] // key.shape[2]
    if repeats > 1 and not _takes_shared_keys(query, mask):
        key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    context_bncd = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3),
        key.permute(1, 2, 0, 3),
        value.permute(1, 2, 0, 3),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return context_bncd.permute(2, 0, 1, 3)


def _takes_shared_keys(query: Tensor, mask: Tensor | None) -> bool:
    """True if a kernel supports grouped-query attention: in torch 2.11, flash attention."""
    return query.device.type == "cpu" or (mask is None and query.dtype is not torch.float32)


def refuse_unused(name: str, **given: object) -> None:
    """Refuse (ValueError) what a causal core attention over whole sequences would not honour."""
    for argument, value in given.items():
        if value is not None:
            raise ValueError(
                f"{argument} ({type(value).__name__}) must be None in {name}, which is causal over "
                "whole sequences; use Transformer Engine's attention"
            )
