"""The heterogeneous balance loss and how it joins the language-model loss.

`L_b = sum_i eta_i f_i P_i` (heterogeneous load balance loss of arXiv 2410.07348), `eta = 1` for FFN and `tau` for
zero-computation experts. Perfect balance sends the fraction phi of all selections to FFN experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor


def local_balance_loss(
    scores: Tensor,
    routing_map: Tensor,
    balance_weights: Tensor,
    group: torch.distributed.ProcessGroup | None,
    num_sequences: int = 1,
) -> Tensor:
    """This rank's summand of the balance loss.

    The fractions f_i are taken over all tokens that the group shares, the probabilities P_i over
    the local tokens only, divided by the shared count: the summands of the group's ranks add up to
    L_b, and so do their gradients. f_i counts selections and has no gradient.

    Args:
        scores: [T, E] fp32 probabilities of the local tokens, rows sum to 1.
        routing_map: [T, E] bool selections of the local tokens, before any capacity limit.
        balance_weights: [E] fp32 eta.
        group: Ranks that hold parts of the same sequences (tensor x context), or None.
        num_sequences: 1 takes one loss over all tokens; B takes the mean of one loss per sequence,
            with tokens ordered [sequence position, sequence] as in Megatron's [s, b, h].

    Returns:
        Scalar fp32, differentiable in `scores`.
    """
    num_experts = scores.shape[1]
    counts = routing_map.view(-1, num_sequences, num_experts).sum(dim=0, dtype=torch.float32)
    sums = scores.view(-1, num_sequences, num_experts).sum(dim=0)
    num_tokens = scores.shape[0] // num_sequences
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
        num_tokens = num_tokens * group.size()
    per_sequence = (balance_weights * counts * sums).sum(dim=-1) / num_tokens**2
    return per_sequence.mean()


def attach_loss(
    activation: Tensor, loss: Tensor, num_tokens: int, group_size: int, per_token_loss: bool
) -> Tensor:
    """Give `loss` a gradient without returning it: megatron-core's auxiliary-loss mechanism.

    Args:
        activation: Any tensor on the way to the language-model loss; returned unchanged.
        loss: Scalar, this rank's summand, beta included.
        num_tokens: Local tokens of the micro-batch.
        group_size: Ranks that share the micro-batch's sequences (tensor x context).
        per_token_loss: `TransformerConfig.calculate_per_token_loss`. Gradients are then divided by
            the number of tokens of the global batch at the end of the step; multiplying by this
            micro-batch's token count leaves the mean over micro-batches
            (`megatron/core/transformer/moe/router.py: attach_and_log_load_balancing_loss`).
    """
    if per_token_loss:
        loss = loss * (num_tokens * group_size)
    return MoEAuxLossAutoScaler.apply(activation, loss)
