"""The heterogeneous balance loss and how it joins the language-model loss.

`L_b = sum_i eta_i f_i P_i` (arXiv 2410.07348, heterogeneous load balance loss), with `eta = 1` for
FFN and `tau` for zero-computation experts. Perfect balance sends the fraction phi of all selections
to FFN experts.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor


def selected_fractions(
    counts: Tensor, num_tokens: int, group: torch.distributed.ProcessGroup | None
) -> Tensor:
    """f_i: the fraction of tokens that select each expert, over all tokens that a group shares.

    Args:
        counts: [S, E] fp32 selections of each expert among the local tokens of each of S sequences,
            before any capacity limit; S = 1 counts all tokens together.
        num_tokens: Local tokens of a sequence.
        group: Ranks that hold parts of the same sequences (tensor x context), or None.

    Returns:
        [S, E] fp32.
    """
    if group is not None and group.size() > 1:
        counts = counts.clone()
        torch.distributed.all_reduce(counts, group=group)
        num_tokens = num_tokens * group.size()
    return counts / num_tokens


class GlobalBatchFractions:
    """f_i over the global batch as far as it has been seen in the present step.

    The micro-batches that all data-parallel ranks run at the same time count together, and those
    that ran before in the step count with them (the mean of `selected_fractions` over the wider
    group). So the value depends on micro-batch size x data-parallel size, and on nothing else.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self._sum: Tensor | None = None
        self._count = 0

    def add(
        self, counts: Tensor, num_tokens: int, group: torch.distributed.ProcessGroup | None
    ) -> Tensor:
        """Count a micro-batch; returns [1, E] fp32 fractions, this micro-batch included.

        Args:
            counts: [1, E] fp32 selections of the local tokens.
            num_tokens: T, local tokens.
            group: Ranks that run the same micro-batch index (tensor x context x data).
        """
        fractions = selected_fractions(counts, num_tokens, group)
        self._sum = fractions if self._sum is None else self._sum + fractions
        self._count += 1
        return self._sum / self._count


def local_balance_loss(
    score_sums: Tensor, fractions: Tensor, balance_weights: Tensor, num_tokens: int
) -> Tensor:
    """This rank's summand of the balance loss.

    The probabilities P_i are summed over the local tokens and divided by the number of tokens that
    the group shares: the summands of the group's ranks add up to L_b, and so do their gradients.
    f_i counts selections and has no gradient.

    Args:
        score_sums: [S, E] fp32 probabilities, summed over the local tokens of each sequence.
        fractions: [S, E] fp32 f_i; the result is the mean over the sequences.
        balance_weights: [E] fp32 eta.
        num_tokens: Tokens of a sequence on all ranks that hold parts of it (tensor x context).

    Returns:
        Scalar fp32, differentiable in `score_sums`.
    """
    return (balance_weights * fractions * (score_sums / num_tokens)).sum(dim=-1).mean()


def attached_loss(loss: Tensor, num_tokens: int, group_size: int, per_token_loss: bool) -> Tensor:
    """`loss` as it has to be attached to count once, whatever gradients are divided by.

    Args:
        loss: Scalar, this rank's summand, beta included.
        num_tokens: Local tokens of the micro-batch.
        group_size: Ranks that share the micro-batch's sequences (tensor x context).
        per_token_loss: `TransformerConfig.calculate_per_token_loss`. Gradients are then divided by
            the number of tokens of the global batch at the end of the step; multiplying by this
            micro-batch's token count leaves the mean over micro-batches
            (`megatron/core/transformer/moe/router.py: attach_and_log_load_balancing_loss`).
    """
    return loss * (num_tokens * group_size) if per_token_loss else loss


def attach_loss(activation: Tensor, loss: Tensor) -> Tensor:
    """Give `loss` a gradient without returning it: megatron-core's auxiliary-loss mechanism.

    Args:
        activation: Any tensor on the way to the language-model loss; returned unchanged.
        loss: Scalar, of `attached_loss`.
    """
    return MoEAuxLossAutoScaler.apply(activation, loss)
