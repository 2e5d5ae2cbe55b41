"""FFN experts of each class of tokens, in one step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moepp_megatron.data.token_frequency import frequency_bands, token_counts
from moepp_megatron.data.token_groups import (
    BAND_EDGES,
    BANDS,
    TokenGroups,
    classes_of_vocabulary,
    token_groups,
)
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Part, PartContext, State, Step, Why
from moepp_megatron.training.tagging import layers_know_tokens, tag_tokens


class TokenClassesPart(Part):
    """Counts by class of token ids.

    Args:
        run: The run; its layers know their tokens.

    Attributes:
        groups: The classes, the same on every rank.
    """

    key: ClassVar[str] = "token_classes"

    def __init__(self, run: PartContext) -> None:
        self._run = run
        self.groups: TokenGroups | None = None

    @classmethod
    def of(cls, run: PartContext) -> TokenClassesPart | None:
        """The part of a run; None where no classes are measured."""
        is_measured = run.config.observe.token_groups and layers_know_tokens(run.config)
        return cls(run) if is_measured else None

    def state(self) -> State:
        """The band of each token id as one digit."""
        assert self.groups is not None, "no state has been loaded"
        per_band = self.groups.size // len(BANDS)
        return {"bands": "".join(map(str, (self.groups.of_ids // per_band).tolist()))}

    def load(self, state: State, why: Why, step: int) -> Iterable[Alert]:
        """Take over the bands, and let the layers count; a collective.

        They are counted only where no checkpoint has them, because a longer run has other samples.
        """
        if why == "rollback":
            return ()
        size, bands = self._run.config.model.vocab_size, state.get("bands", "")
        if len(bands) == size:
            of_ids = np.array([int(digit) for digit in bands], dtype=np.int64)
        else:
            of_ids = frequency_bands(counts_on_ranks(self._run.train_set, size), BAND_EDGES)
        tokenizer = getattr(getattr(self._run.train_set, "config", None), "tokenizer", None)
        classes = None
        if isinstance(tokenizer, Tokenizer):
            classes = classes_of_vocabulary(tokenizer, size)
        self.groups = token_groups(of_ids, classes)
        on_device = torch.from_numpy(self.groups.of_ids).to(torch.cuda.current_device())
        self._statistics = tag_tokens(self._run.model.models, on_device)
        for statistics in self._statistics:
            statistics.num_groups = self.groups.size
        return ()

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, Any]:
        """FFN experts by class; a collective. Classes without a token are left out."""
        assert self.groups is not None, "no state has been loaded"
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


def counts_on_ranks(dataset: Any, vocab_size: int) -> NDArray[np.int64]:
    """[V] int64 `token_counts` of the training set: rank 0 reads, and every rank must call."""
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=torch.cuda.current_device())
    if dist.get_rank() == 0:
        counts.copy_(torch.from_numpy(token_counts(dataset, vocab_size)))
    dist.broadcast(counts, 0)
    shared: NDArray[np.int64] = counts.cpu().numpy()
    return shared
