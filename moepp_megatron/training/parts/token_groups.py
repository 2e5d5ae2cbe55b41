"""FFN experts of each class of tokens, in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.token_frequency import frequency_bands, token_counts
from moepp_megatron.data.token_groups import (
    BAND_EDGES,
    BANDS,
    TokenGroups,
    classes_of_vocabulary,
    token_groups,
)
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.statistics import RoutingStatistics
from moepp_megatron.training.part import Part, Run, Step
from moepp_megatron.training.parts.routing_counts import RoutingCounts
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.tagging import layers_know_tokens, tags_of


class GroupCollector(Part):
    """Counts by class of token ids.

    Its construction makes the model's layers count.

    Args:
        config: The run's configuration.
        model: The wrapped model.
        layer_numbers: Global numbers of all MoE layers of the model.
        groups: The classes, the same on every rank.
    """

    def __init__(
        self,
        config: Config,
        model: TrainingModel,
        layer_numbers: Sequence[int],
        groups: TokenGroups,
    ) -> None:
        self.groups = groups
        self._numbers = list(layer_numbers)
        self._statistics: dict[int, RoutingStatistics] = {}
        on_device = torch.from_numpy(groups.of_ids).to(torch.cuda.current_device())
        for chunk in model.models:
            tags_of(chunk, config).groups = on_device
            self._statistics |= moe_statistics(chunk)
        for statistics in self._statistics.values():
            statistics.num_groups = groups.size
        self._counts: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, run: Run) -> GroupCollector | None:
        """The part of a run; None where no classes are measured."""
        groups = _groups_of_run(run.config, run.train_set, run.extra.get("token_bands"))
        if groups is None:
            return None
        return cls(run.config, run.model, run.require(RoutingCounts).layer_numbers, groups)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Forget the counts before."""
        self._counts = None

    def counts(self) -> NDArray[np.int64]:
        """[MoE layers, C, 2] of the step, over all ranks: FFN experts and tokens.

        The first call in a step is a collective, which every rank must make.
        """
        if self._counts is None:
            shape = len(self._numbers), self.groups.size, 2
            local = torch.zeros(shape, dtype=torch.int64, device=torch.cuda.current_device())
            for row, number in enumerate(self._numbers):
                statistics = self._statistics.get(number)
                if statistics is not None and statistics.groups is not None:
                    local[row] = statistics.groups
            dist.all_reduce(local)
            members = self.groups.members.astype(np.int64)
            self._counts = np.einsum("cg,lgk->lck", members, local.cpu().numpy())
        return self._counts

    def state(self) -> dict[str, Any]:
        """The classes' bands."""
        return {"token_bands": _bands_text(self.groups)}

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, Any]:
        """By name of the class; a collective. Classes without a token are left out."""
        total = self.counts().sum(axis=0)
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
