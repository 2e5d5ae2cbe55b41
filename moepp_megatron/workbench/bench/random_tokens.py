"""Sequences of random tokens, for measurements that do not depend on the text."""

from __future__ import annotations

import torch
from torch import Tensor

from moepp_megatron.config import Config


class RandomTokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A data set without end; each sequence depends on its index alone.

    Args:
        config: Gives the length of a sequence and the size of the vocabulary.
    """

    def __init__(self, config: Config) -> None:
        self._model = config.model

    def __len__(self) -> int:
        """A length larger than any run reads."""
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence."""
        length = self._model.seq_length
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self._model.vocab_size, (length + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
