"""How many tokens of each group of token ids a batch has."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.observe.token_shift import GROUPS, group_of
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import first_of_tensor_ranks, shared_sum


class TokenCounts:
    """Counts a batch's labels that have a loss, on the device; a `Summand`.

    Three kernels a micro-batch, and one a step.

    Args:
        vocab_size: Size of the model's vocabulary.
    """

    def __init__(self, vocab_size: int) -> None:
        device = torch.cuda.current_device()
        self._group_of = torch.from_numpy(group_of(np.arange(vocab_size))).to(device)
        self._counts = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self._total: Tensor | None = None

    def begin(self) -> None:
        """Begin a new batch."""
        self._counts.zero_()
        self._total = None

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add a micro-batch, on the last pipeline stage.

        Args:
            batch: `labels` [b, s] int64, and `loss_mask` [b, s], 0 for those that do not count.
        """
        if first_of_tensor_ranks():
            groups = self._group_of[batch["labels"].reshape(-1)]
            self._counts.index_add_(0, groups, batch["loss_mask"].reshape(-1).double())

    def summand(self) -> Tensor:
        """[GROUPS] float64 on the device: this rank's counts."""
        return self._counts

    def take_sum(self, total: Tensor) -> None:
        """Note the counts [GROUPS] over all ranks."""
        self._total = total

    def end(self) -> NDArray[np.float64]:
        """[GROUPS] counts over all ranks; a collective unless the step has summed them."""
        if self._total is None:
            self._total = shared_sum(self.summand().clone()).cpu()
        return self._total.numpy()
