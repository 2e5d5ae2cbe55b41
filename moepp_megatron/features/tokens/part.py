"""Measurements by data source and by class of token ids, of one step."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.loader import check_tokens
from moepp_megatron.data.samples import SOURCES, source_names
from moepp_megatron.data.token_classes import (
    BAND_EDGES,
    BANDS,
    TokenGroups,
)
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.statistics import RoutingStatistics
from moepp_megatron.moe.token_tags import TokenTags
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Fields, Part, PartContext, State, Step, Why
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import (
    StepCounts,
    Summand,
    first_of_tensor_ranks,
    sum_over_ranks,
    zeros,
)


class SourcesPart(Part):
    """Counts by data source.

    Its construction makes the model's layers count, if they know their tokens. A loss is of the
    source of the token that it was made after.

    Attributes:
        names: Names of the sources; none where they are not known.
        losses: [sources, 2] sum of token losses in nats, and tokens, of the step.
    """

    key = "sources"

    def __init__(self, run: PartContext) -> None:
        config, models = run.config, run.model.models
        self.names = source_names(run.train_set)
        self._num_ffn, self._num_experts = config.moe.num_ffn_experts, config.moe.num_experts
        # On every rank alike, whether or not its pipeline stage has layers that count.
        self._counts_experts = _layers_know_tokens(config)
        self._statistics = _tag_tokens(models if self._counts_experts else ())
        for statistics in self._statistics:
            statistics.num_sources = len(self.names)
        self.losses = StepCounts(len(self.names), 2)

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if the sources are known."""
        return run.config.observe.token_groups and bool(source_names(run.train_set))

    def begin_step(self, step: int, layout: Layout) -> None:
        """Forget the losses before."""
        self.losses.reset()

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The sources, for layers that count experts by them."""
        return {SOURCES: batch[SOURCES]} if self._counts_experts else {}

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Record a micro-batch of the step, with losses [b, s], on the last pipeline stage.

        `batch` has `SOURCES`, and `loss_mask` [b, s], 0 for tokens that do not count.
        """
        # Tensor-parallel ranks hold the same tokens: only the first of each group counts.
        if not first_of_tensor_ranks():
            return
        mask = batch["loss_mask"].reshape(-1).double()
        pairs = torch.stack([token_losses.detach().reshape(-1).double() * mask, mask], dim=-1)
        self.losses.own.index_add_(0, batch[SOURCES].reshape(-1).long(), pairs)

    def summands(self) -> Sequence[Summand]:
        """The losses."""
        return (self.losses,)

    def record(self, step: Step, fields: Fields) -> Fields:
        """Metrics by source; a collective. A source without a token is left out."""
        losses = self.losses.total()
        tokens = losses[:, 1]
        seen = [index for index in range(len(self.names)) if tokens[index] > 0]

        def named(values: Any) -> dict[str, Any]:
            return {self.names[index]: values[index].tolist() for index in seen}

        sources = {
            "source_tokens": named(tokens / tokens.sum()),
            "source_loss": named(losses[:, 0] / np.where(tokens > 0, tokens, 1.0)),
        }
        if self._counts_experts:
            local = zeros(len(self.names), self._num_experts)
            for statistics in self._statistics:
                if statistics.sources is not None:
                    local += statistics.sources
            selected = sum_over_ranks(local)
            shares = selected / selected.sum(dim=1, keepdim=True)
            sources["source_ffn_share"] = named(shares[:, : self._num_ffn].sum(dim=1))
            sources["source_expert_share"] = named(shares)
        return sources


class TokenClassesPart(Part):
    """Counts by class of token ids."""

    key = "token_classes"

    def __init__(self, run: PartContext) -> None:
        self._run = run
        self.groups: TokenGroups | None = None

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if classes are measured."""
        return run.config.observe.token_groups and _layers_know_tokens(run.config)

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
            of_ids = _frequency_bands(_counts_on_ranks(self._run.train_set, size), BAND_EDGES)
        tokenizer = getattr(getattr(self._run.train_set, "config", None), "tokenizer", None)
        known = tokenizer if isinstance(tokenizer, Tokenizer) else None
        self.groups = TokenGroups.of(of_ids, known)
        on_device = torch.from_numpy(self.groups.of_ids).to(torch.cuda.current_device())
        self._statistics = _tag_tokens(self._run.model.models, on_device)
        for statistics in self._statistics:
            statistics.num_groups = self.groups.size
        return ()

    def record(self, step: Step, fields: Fields) -> Fields:
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


def _counts_on_ranks(dataset: Any, vocab_size: int) -> NDArray[np.int64]:
    """[V] int64 `_token_counts` of the training set: rank 0 reads, and every rank must call."""
    counts = torch.zeros(vocab_size, dtype=torch.int64, device=torch.cuda.current_device())
    if dist.get_rank() == 0:
        counts.copy_(torch.from_numpy(_token_counts(dataset, vocab_size)))
    dist.broadcast(counts, 0)
    shared: NDArray[np.int64] = counts.cpu().numpy()
    return shared


def _layers_know_tokens(config: Config) -> bool:
    """True unless the combined schedule, or a router in a CUDA graph, keeps tags from layers."""
    return not (
        config.parallel.overlap_moe_expert_parallel_comm
        or config.training.captures_router
        or config.moe.is_vanilla
    )


def _tag_tokens(
    chunks: Iterable[torch.nn.Module], groups: Tensor | None = None
) -> list[RoutingStatistics]:
    """Give layers the groups of token ids, [vocabulary] int64, or none; return their statistics."""
    found: list[RoutingStatistics] = []
    for chunk in chunks:
        assert isinstance(chunk, MoEPPGPTModel), "layers of other models know nothing"
        chunk.token_tags = chunk.token_tags or TokenTags()
        if groups is not None:
            chunk.token_tags.groups = groups
        found += moe_statistics(chunk).values()
    return found


# Checked and counted together, since a call a sample adds up where samples are short.
_TOKENS_AT_ONCE = 1 << 16
# About as many tokens are read.
_TOKENS = 1 << 21


def _token_counts(dataset: Any, vocab_size: int) -> NDArray[np.int64]:
    """Count ids in evenly spaced samples, [vocab_size] int64; ConfigError if one is outside."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    length = len(dataset[0]["tokens"])
    wanted = min(len(dataset), max(1, _TOKENS // length))
    indices = np.linspace(0, len(dataset) - 1, wanted, dtype=np.int64).tolist()
    at_once = max(1, _TOKENS_AT_ONCE // length)
    for begin in range(0, wanted, at_once):
        part = indices[begin : begin + at_once]
        tokens = torch.stack([dataset[index]["tokens"] for index in part])
        check_tokens(dataset, part, {"tokens": tokens}, vocab_size)
        counts += np.bincount(tokens.flatten().numpy(), minlength=vocab_size)
    return counts


def _frequency_bands(counts: NDArray[np.int64], edges: Sequence[float]) -> NDArray[np.int64]:
    """Sort token ids by frequency into classes of these shares: [V] int64, 0 the most frequent."""
    # Stable, so that ids of one count are in one order everywhere.
    order = np.argsort(-counts, kind="stable")
    ordered = counts[order]
    # The middle of each id's own tokens: an id with more tokens than a class holds fills classes.
    middle = np.cumsum(ordered) - ordered / 2
    classes = np.empty(len(counts), dtype=np.int64)
    limits = np.asarray(edges, dtype=np.float64) * int(counts.sum())
    classes[order] = np.searchsorted(limits, middle, side="right")
    classes[counts == 0] = len(edges)
    return classes
