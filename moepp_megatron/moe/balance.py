"""The heterogeneous balance loss and how it joins the language-model loss.

`L_b = sum_i eta_i f_i P_i` (arXiv 2410.07348, heterogeneous load balance loss), with `eta = 1` for
FFN and `tau` for zero-computation experts. Perfect balance sends the fraction phi of all selections
to FFN experts. The grouped loss (ZEDA, arXiv 2605.18643) has the same share, and leaves open which
experts of the two groups take it.
"""

from typing import assert_never

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig

# Tokens of a sequence: one number for all, or [S, 1] fp32 where some are padding.
NumTokens = int | Tensor


def tokens_of_sequences(num_tokens: int, num_sequences: int, padded: Tensor | None) -> NumTokens:
    """Local tokens of each sequence, without padding.

    `padded` is [T] bool in [sequence position, sequence] order, or None.
    """
    if padded is None:
        return num_tokens // num_sequences
    return (~padded).view(-1, num_sequences).sum(dim=0, dtype=torch.float32).unsqueeze(-1)


def over_group(values: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The sum over the ranks of a group, or over only this rank."""
    if group is None or group.size() == 1:
        return values
    total = values.clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def tokens_over_group(
    num_tokens: NumTokens, group: torch.distributed.ProcessGroup | None
) -> NumTokens:
    """Tokens of each sequence on all ranks that share it; without padding each has as many."""
    if isinstance(num_tokens, int):
        return num_tokens * (1 if group is None else group.size())
    return over_group(num_tokens, group)


class SelectedFractions:
    """f_i: the fraction of tokens that select each expert, over all that was added since a reset.

    Over the global batch that is what has been seen of it in this step: the micro-batches that
    data-parallel ranks run at the same time count together with those before them, so the value
    depends on micro-batch size x data-parallel size only.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new step."""
        self._counts: Tensor | None = None
        self._num_tokens: NumTokens | None = None

    def add(
        self, counts: Tensor, num_tokens: NumTokens, group: torch.distributed.ProcessGroup | None
    ) -> Tensor:
        """Count a micro-batch; returns the fractions with it included, [S, E] fp32.

        `counts` are [S, E] fp32 selections of the local tokens of S sequences before any capacity
        limit (S = 1 counts all tokens together), `group` the ranks that hold parts of these, or of
        the global batch those that run the same micro-batch index (tensor x context x data). A
        sequence that is all padding has 0.
        """
        counts = over_group(counts, group)
        self._counts = counts if self._counts is None else self._counts + counts
        tokens = tokens_over_group(num_tokens, group)
        self._num_tokens = tokens if self._num_tokens is None else self._num_tokens + tokens
        return self._counts / _at_least_one(self._num_tokens)


def loss_weights(fractions: Tensor, balance_weights: Tensor, config: MoEPPConfig) -> Tensor:
    """The factors of the mean probabilities in the balance loss, [S, E] like `fractions`.

    They are `eta_i f_i`. The grouped loss has the mean of the group's f for f_i, and the factor
    `sum_i 1 / eta_i / K`, by which it is 1 where balance is perfect.
    """
    match config.balance_loss:
        case "heterogeneous":
            return balance_weights * fractions
        case "grouped":
            groups = fractions.tensor_split([config.num_ffn_experts], dim=-1)
            means = [group.mean(-1, keepdim=True).expand_as(group) for group in groups]
            scale = (1.0 / balance_weights).sum() / config.router_topk
            return balance_weights * torch.cat(means, dim=-1) * scale
        case other:
            assert_never(other)


def local_balance_loss(score_sums: Tensor, weights: Tensor, num_tokens: NumTokens) -> Tensor:
    """This rank's summand of the balance loss, a scalar, differentiable in `score_sums`.

    The summands of the group's ranks add up to L_b, and so do their gradients; f_i has none.
    `score_sums` are [S, E] fp32 probabilities, summed over the local tokens of each sequence,
    `weights` [S, E] are those of `loss_weights`, `num_tokens` the tokens of a sequence on all
    ranks (`tokens_over_group`). The result is the mean over the sequences that have tokens.
    """
    if isinstance(num_tokens, int):
        # A few numbers: launches are all of the time, so one product with its sum, and one scale.
        total = torch.dot(score_sums.flatten(), weights.flatten().to(score_sums.dtype))
        return total / (num_tokens * score_sums.shape[0])
    losses_S = (weights * (score_sums / _at_least_one(num_tokens))).sum(dim=-1)
    return losses_S.sum() / _at_least_one((num_tokens > 0).sum())


def _at_least_one(num_tokens: NumTokens) -> NumTokens:
    """The counts with 0 replaced by 1, so that sums of 0 can be divided by them."""
    return num_tokens if isinstance(num_tokens, int) else num_tokens.clamp(min=1)


def attached_loss(
    loss: Tensor, coeff: float, num_tokens: NumTokens, per_token_loss: bool
) -> Tensor:
    """This rank's `loss` times `coeff` (beta), to count once whatever divides gradients later.

    `MoEAuxLossAutoScaler` then gives it a gradient: megatron-core's auxiliary-loss mechanism.

    `num_tokens` are those of the micro-batch without padding, on all ranks that share its
    sequences. With `TransformerConfig.calculate_per_token_loss` gradients are divided by the tokens
    of the global batch at the end of the step, so the loss is multiplied by those of the
    micro-batch (`moe/router.py: attach_and_log_load_balancing_loss`).
    """
    return loss * (coeff * num_tokens if per_token_loss else coeff)
