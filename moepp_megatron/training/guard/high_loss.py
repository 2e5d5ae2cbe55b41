"""Which token ids have a high loss: running means over the run, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.training.step import Batch


class HighLossTokens:
    """Learns how well the token after each token id is predicted.

    A token id's mean is its sum of losses over its number of occurrences, both decayed by one
    factor per step, so an id that is not seen keeps its mean and loses weight.

    Args:
        vocab_size: Token ids.
        share: Share of all tokens that counts as high loss.
        decay: Weight of the past per step.
        state: Result of an earlier `state()`; one of another vocabulary is ignored.
    """

    def __init__(
        self, vocab_size: int, share: float, decay: float, state: Mapping[str, Any] | None = None
    ) -> None:
        self._share, self._decay = share, decay
        self._step = torch.zeros(2, vocab_size, dtype=torch.float64)
        # [2, vocabulary] sums of losses, and occurrences.
        self._sums = torch.zeros_like(self._step)
        before = None if state is None else state.get("sums")
        if isinstance(before, Tensor) and before.shape == self._sums.shape:
            self._sums = before

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint; later steps create a new tensor."""
        return {"sums": self._sums}

    def begin_step(self) -> None:
        """Discard the losses of a step before that is not to be learnt from."""
        self._step = torch.zeros_like(self._step)

    @torch.no_grad()
    def add(self, batch: Batch, token_losses: Tensor) -> None:
        """Record a micro-batch of the step, on the last pipeline stage.

        Args:
            batch: `tokens` [b, s] int64 and `loss_mask` [b, s], 0 for tokens that do not count.
            token_losses: [b, s] loss of the token after each.
        """
        # Tensor-parallel ranks hold the same tokens: only the first of each group counts.
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            return
        ids = batch["tokens"].reshape(-1).cpu()
        mask = batch["loss_mask"].reshape(-1).cpu().double()
        losses = token_losses.detach().reshape(-1).cpu().double()
        self._step[0].index_add_(0, ids, losses * mask)
        self._step[1].index_add_(0, ids, mask)

    def end_step(self) -> None:
        """Learn from the step; every rank must call.

        The sums are made on rank 0 and sent from there, so that all ranks have the same bits.
        """
        on_device = self._step.to(torch.cuda.current_device())
        dist.reduce(on_device, dst=0)
        dist.broadcast(on_device, src=0)
        # Beyond fp32's range nothing is learnt: one infinite loss would stay for ever.
        if bool(on_device.isfinite().all()):
            self._sums = self._decay * self._sums + (1.0 - self._decay) * on_device.cpu()
        self.begin_step()

    def mask(self) -> Tensor:
        """[vocabulary] bool, on the CPU: the worst token ids that make up the share of all tokens.

        It has at least one id once there are losses; of equal means the smaller id comes first.
        """
        losses, counts = self._sums
        seen = counts > 0
        means = torch.where(seen, losses / counts.clamp(min=torch.finfo(counts.dtype).tiny), -1.0)
        order = torch.sort(means, descending=True, stable=True).indices
        fits = counts[order].cumsum(0) <= self._share * counts.sum()
        fits[0] = True
        chosen = torch.zeros_like(seen)
        chosen[order[fits]] = True
        return chosen & seen
