"""The loss of multi-token prediction (MTP, DeepSeek-V3, arXiv 2412.19437, section 2.2)."""

from collections.abc import Callable

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class MultiTokenLoss:
    """Attaches the loss of multi-token prediction to the hidden states, and adds it up for the log.

    The loss of depth k is the sum over positions i of the cross entropy of token i + 1 + k, counted
    where the loss mask counts that token. All depths' together weigh `mtp_loss_scaling_factor`, and
    are divided by the tokens of the model's own loss (the paper's 1/T), so it is the same in every
    layout. megatron-core's `process_mtp_loss` divides by the tokens of a micro-batch that have such
    a token: with a loss mask or context parallelism, gradients would depend on the layout.

    Attributes:
        sums: [depths, 2] float64 on the device since the last reset: sum of losses, and tokens;
            None where nothing was counted.
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def reset(self) -> None:
        """Start counting a new step."""
        self.sums = None

    def attach(
        self,
        hidden_states: Tensor,
        mtp_states: list[Tensor],
        labels: Tensor,
        loss_mask: Tensor | None,
        token_losses: Callable[[Tensor, Tensor], Tensor],
        config: TransformerConfig,
        cp_group: torch.distributed.ProcessGroup,
    ) -> Tensor:
        """Hidden states [s, b, D] with the gradient of the loss of `mtp_states`, one per depth.

        `labels` are [b, s] int64 next tokens, `loss_mask` [b, s] those that count (None for all),
        `token_losses` gives [b, s] losses of hidden states and labels; ranks of `cp_group` share a
        sequence.
        """
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        weight = config.mtp_loss_scaling_factor / len(mtp_states)
        if not config.calculate_per_token_loss:
            weight = weight / mask.sum().clamp(min=1)
        sums = []
        for states in mtp_states:
            labels, _ = roll_tensor(labels, cp_group=cp_group)
            mask, count = roll_tensor(mask, cp_group=cp_group)
            loss = mask * token_losses(states, labels)
            sums.append(torch.stack([loss.detach().double().sum(), count.double()]))
            hidden_states = MTPLossAutoScaler.apply(hidden_states, weight * loss)
        total = torch.stack(sums)
        self.sums = total if self.sums is None else self.sums + total
        return hidden_states
