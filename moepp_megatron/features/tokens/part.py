"""FFN experts of each class of tokens, in one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moepp_megatron.config import Config
from moepp_megatron.data.token_frequency import frequency_bands, token_counts
from moepp_megatron.data.token_groups import (
    BAND_EDGES,
    BANDS,
    TokenGroups,
    classes_of_vocabulary,
    token_groups,
)
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.training.part import Part, PartContext, Step
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.tagging import layers_know_tokens, tag_tokens


class TokenClassesPart(Part):
    """Counts by class of token ids.

    Its construction makes the model's layers count.

    Args:
        model: The wrapped model.
        groups: The classes, the same on every rank.
    """

    def __init__(self, model: TrainingModel, groups: TokenGroups) -> None:
        self.groups = groups
        on_device = torch.from_numpy(groups.of_ids).to(torch.cuda.current_device())
        self._statistics = tag_tokens(model.models, on_device)
        for statistics in self._statistics:
            statistics.num_groups = groups.size

    @classmethod
    def of(cls, run: PartContext) -> TokenClassesPart | None:
        """The part of a run; None where no classes are measured."""
        groups = _groups_of_run(run.config, run.train_set, run.extra.get("token_bands"))
        return None if groups is None else cls(run.model, groups)

    def state(self) -> dict[str, Any]:
        """The classes' bands."""
        return {"token_bands": _bands_text(self.groups)}

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, Any]:
        """FFN experts by class; a collective. Classes without a token are left out."""
        shape = self.groups.size, 2
        counts = torch.zeros(shape, dtype=torch.int64, device=torch.cuda.current_device())
        for statistics in self._statistics:
            if statistics.groups is not None:
                counts += statistics.groups
        dist.all_reduce(counts)
        # [C, 2] of all layers: FFN experts and tokens.
        total = self.groups.members.astype(np.int64) @ counts.cpu().numpy()
        return {
            "class_ffn_per_token": {
                name: ffn / tokens
                for name, (ffn, tokens) in zip(self.groups.names, total.tolist(), strict=True)
                if tokens > 0
            }
        }


def _groups_of_run(config: Config, dataset: Any, bands: str | None) -> TokenGroups | None:
    """The classes of token ids; None where layers do not know their tokens, or none are measured.

    Every rank must call.

    Args:
        config: The run's configuration.
        dataset: The training set.
        bands: What a checkpoint holds (`_bands_text`); None at the beginning. It is not counted
            again because a longer run has other samples.
    """
    if not config.observe.token_groups or not layers_know_tokens(config):
        return None
    size = config.model.vocab_size
    if bands is not None and len(bands) == size:
        of_ids = np.array([int(digit) for digit in bands], dtype=np.int64)
    else:
        of_ids = frequency_bands(counts_on_ranks(dataset, size), BAND_EDGES)
    tokenizer = getattr(getattr(dataset, "config", None), "tokenizer", None)
    classes = classes_of_vocabulary(tokenizer, size) if isinstance(tokenizer, Tokenizer) else None
    return token_groups(of_ids, classes)


def counts_on_ranks(dataset: Any, vocab_size: int) -> NDArray[np.int64]:
    """[V] int64 `token_counts` of the training set: rank 0 reads, and every rank must call."""
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=torch.cuda.current_device())
    if dist.get_rank() == 0:
        counts.copy_(torch.from_numpy(token_counts(dataset, vocab_size)))
    dist.broadcast(counts, 0)
    shared: NDArray[np.int64] = counts.cpu().numpy()
    return shared


def _bands_text(groups: TokenGroups) -> str:
    """The band of each token id as one digit, for a checkpoint."""
    per_band = groups.size // len(BANDS)
    return "".join(map(str, (groups.of_ids // per_band).tolist()))
