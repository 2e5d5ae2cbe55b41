"""Loss, FFN share and use of the experts by data source, of one step."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.data.document_sources import SOURCES, source_names
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.training.collect import sum_over_ranks
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import Batch
from moepp_megatron.training.tagging import layers_know_tokens, tags_of


class SourceCollector:
    """Counts by data source. Every rank has one and calls its methods together.

    Its construction makes the model's layers count, if they know their tokens. A loss is of the
    source of the token that it was made behind; nothing synchronises before `collect`.

    Args:
        config: The run's configuration.
        model: The wrapped model.
        dataset: The training set.
    """

    def __init__(self, config: Config, model: TrainingModel, dataset: Any) -> None:
        self._names = source_names(dataset) if config.observe.token_groups else ()
        self._num_ffn, self._num_experts = config.moe.num_ffn_experts, config.moe.num_experts
        self._statistics = []
        if self._names and layers_know_tokens(config):
            for chunk in model.models:
                tags_of(chunk, config)
                self._statistics += list(moe_statistics(chunk).values())
        for statistics in self._statistics:
            statistics.num_sources = len(self._names)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the losses before."""
        self._losses: Tensor | None = None

    @torch.no_grad()
    def add_losses(self, batch: Batch, token_losses: Tensor) -> None:
        """Record a micro-batch of the step, on the last pipeline stage.

        Args:
            batch: `loss_mask` [b, s], 0 for tokens that do not count, and `SOURCES`.
            token_losses: [b, s].
        """
        # Tensor-parallel ranks hold the same tokens: only the first of each group counts.
        if not self._names or parallel_state.get_tensor_model_parallel_rank() != 0:
            return
        mask = batch["loss_mask"].reshape(-1).double()
        pairs = torch.stack([token_losses.detach().reshape(-1).double() * mask, mask], dim=-1)
        if self._losses is None:
            self._losses = pairs.new_zeros(len(self._names), 2)
        self._losses.index_add_(0, batch[SOURCES].reshape(-1).long(), pairs)

    def collect(self) -> dict[str, Any]:
        """Fields for the record of the step, by name of the source; a collective.

        A source without a token in the step is left out. Nothing where all is of one source.
        """
        if not self._names:
            return {}
        # [sources, 2 + E]: losses, tokens, selections of all layers.
        shape = len(self._names), 2 + self._num_experts
        local = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        if self._losses is not None:
            local[:, :2] = self._losses
        for statistics in self._statistics:
            if statistics.sources is not None:
                local[:, 2:] += statistics.sources
        return self._fields(sum_over_ranks(local))

    def _fields(self, total: Tensor) -> dict[str, Any]:
        tokens = total[:, 1]
        seen = [index for index in range(len(self._names)) if tokens[index] > 0]
        shares = total[:, 2:] / total[:, 2:].sum(dim=1, keepdim=True)

        def named(values: Tensor) -> dict[str, Any]:
            return {self._names[index]: values[index].tolist() for index in seen}

        fields = {
            "source_tokens": named(tokens / tokens.sum()),
            "source_loss": named(total[:, 0] / tokens),
        }
        if total[:, 2:].sum() > 0:
            fields["source_ffn_share"] = named(shares[:, : self._num_ffn].sum(dim=1))
            fields["source_expert_share"] = named(shares)
        return fields
