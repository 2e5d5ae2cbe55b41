"""Loss, FFN share and use of the experts by data source, of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.data.document_sources import SOURCES, source_names
from moepp_megatron.training.collect import sum_over_ranks
from moepp_megatron.training.part import Part, PartContext, Step
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import StepCounts, Summand, first_of_tensor_ranks
from moepp_megatron.training.tagging import layers_know_tokens, tag_tokens


class SourcesPart(Part):
    """Counts by data source.

    Its construction makes the model's layers count, if they know their tokens. A loss is of the
    source of the token that it was made after.

    Args:
        config: The run's configuration.
        model: The wrapped model.
        dataset: The training set.

    Attributes:
        names: Names of the sources; none where they are not known.
        losses: [sources, 2] sum of token losses in nats, and tokens, of the step.
    """

    key: ClassVar[str] = "sources"

    def __init__(self, config: Config, model: TrainingModel, dataset: Any) -> None:
        self.names = source_names(dataset) if config.observe.token_groups else ()
        self._num_ffn, self._num_experts = config.moe.num_ffn_experts, config.moe.num_experts
        # On every rank alike, whether or not its pipeline stage has layers that count.
        self._counts_experts = bool(self.names) and layers_know_tokens(config)
        self._statistics = tag_tokens(model.models if self._counts_experts else ())
        for statistics in self._statistics:
            statistics.num_sources = len(self.names)
        self.losses = StepCounts(len(self.names), 2)

    @classmethod
    def of(cls, run: PartContext) -> SourcesPart | None:
        """The part of a run; None where sources are not known."""
        part = cls(run.config, run.model, run.train_set)
        return part if part.names else None

    def begin_step(self, step: int, layout: Layout) -> None:
        """Forget the losses before."""
        self.losses.reset()

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """The sources, for layers that count experts by them."""
        return {SOURCES: batch[SOURCES]} if self._counts_experts else {}

    @torch.no_grad()
    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Record a micro-batch of the step, on the last pipeline stage.

        Args:
            chunk: The model chunk that has made the losses.
            batch: `loss_mask` [b, s], 0 for tokens that do not count, and `SOURCES`.
            token_losses: [b, s].
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

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, Any]:
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
            shape = len(self.names), self._num_experts
            local = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
            for statistics in self._statistics:
                if statistics.sources is not None:
                    local += statistics.sources
            selected = sum_over_ranks(local)
            shares = selected / selected.sum(dim=1, keepdim=True)
            sources["source_ffn_share"] = named(shares[:, : self._num_ffn].sum(dim=1))
            sources["source_expert_share"] = named(shares)
        return sources
