"""Selections of experts, losses of routers and bytes of dispatch in one step, over all ranks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.margins import EDGES
from moepp_megatron.moe.spec import router_pattern
from moepp_megatron.moe.statistics import BALANCE, Z_LOSS, tracked_losses
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step_sums import Summand, sum_over_ranks, zeros


class RoutingCountsPart(Part):
    """Routing metrics of one step, over all ranks and MoE layers (global `layer_numbers`)."""

    def __init__(self, model: TrainingModel, config: Config, layout: Layout) -> None:
        self._config = config
        self._num_experts = config.moe.num_experts
        self._num_microbatches = layout.num_microbatches
        self._ranks_per_replica = layout.tp * layout.cp
        pattern = router_pattern(model.models[0].config)
        self.layer_numbers = [number for number, is_moe in enumerate(pattern, 1) if is_moe]
        self._is_read_each_step = self._has_margins = False
        # [MoE layers, n] as `summand`, over all ranks; None before they are known.
        self._sums: Tensor | None = None
        self._statistics = {
            number: statistics
            for chunk in model.models
            for number, statistics in moe_statistics(chunk).items()
        }

    @classmethod
    def of(cls, run: PartContext) -> "RoutingCountsPart":
        """The part of a run."""
        return cls(run.model, run.config, run.layout)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Start counting a new step."""
        self.reset(layout.num_microbatches)

    def watch(self, *, logits: bool = False, margins: bool = False) -> None:
        """Sum the selections in every step from now on, and logits or margins if wanted."""
        self._is_read_each_step = True
        self._has_margins |= margins
        for statistics in self._statistics.values():
            statistics.watches_logits = statistics.watches_logits or logits
            statistics.watches_margins = statistics.watches_margins or margins

    def summands(self) -> Sequence[Summand]:
        """The selections, where a part needs them in every step."""
        return (self,) if self._is_read_each_step else ()

    def record(self, step: Step, fields: Fields) -> Fields:
        """The routing metrics of the step; a collective."""
        return self.collect()

    def collect(self) -> dict[str, object]:
        """Sum over all ranks, of which every one must call, and compute the step's metrics."""
        width = self._num_experts + 7
        return self._metrics(sum_over_ranks(self._by_layer(width, self._put_record)))

    def reset(self, num_microbatches: int | None = None) -> None:
        """Start counting a new step, with a new number of micro-batches if it has changed."""
        self._num_microbatches = num_microbatches or self._num_microbatches
        self._sums = None
        for statistics in self._statistics.values():
            statistics.reset()
        get_moe_metrics_tracker().clear()

    def selections(self) -> Tensor:
        """[MoE layers, E] float64 selections of the step, over all ranks.

        Every rank must call; a collective unless the step has summed them.
        """
        return self._total()[:, : self._num_experts]

    def logits(self) -> NDArray[np.float64]:
        """[MoE layers] root mean square of a layer's logits in the step, as `selections`."""
        tokens = self.selections().sum(dim=1) / self._config.moe.router_topk
        squares = self._total()[:, self._num_experts]
        root: NDArray[np.float64] = (
            (squares / (tokens * self._num_experts).clamp(min=1.0)).sqrt().numpy()
        )
        return root

    def margins(self) -> Tensor:
        """[MoE layers, bins] float64 margins of the step (`moe.margins`), as `selections`."""
        return self._total()[:, self._num_experts + 1 :]

    def _total(self) -> Tensor:
        if self._sums is None:
            self.take_sum(sum_over_ranks(self.summand()))
        assert self._sums is not None, "the sums have just been taken"
        return self._sums

    def summand(self) -> Tensor:
        """[MoE layers * n] float64 on the device, of this rank (`step_sums.Summand`).

        The n numbers of a layer are the selections of E experts, the sum of the squares of its
        logits and, where they are watched, its margins.
        """
        bins = len(EDGES) + 1 if self._has_margins else 0
        return self._by_layer(self._num_experts + 1 + bins, self._put_counts).reshape(-1)

    def take_sum(self, total: Tensor) -> None:
        """Note the sums over all ranks, as `summand`."""
        self._sums = total.reshape(len(self.layer_numbers), -1)

    def _by_layer(self, width: int, put: Callable[[Tensor, int], None]) -> Tensor:
        """[MoE layers, width] float64 on the device: rows of this rank's layers, 0 for others."""
        # On the device until the end: one wait for it, not one for each layer.
        local = zeros(len(self.layer_numbers), width)
        for row, number in enumerate(self.layer_numbers):
            if number in self._statistics:
                put(local[row], number)
        return local

    def _put_counts(self, row: Tensor, number: int) -> None:
        counted, experts = self._statistics[number], self._num_experts
        if counted.selected is not None:
            row[:experts] = counted.selected
        if counted.logit_norms:
            row[experts] = torch.stack(counted.logit_norms).double().square().sum()
        if counted.margins is not None:
            row[experts + 1 :] = counted.margins

    def _put_record(self, row: Tensor, number: int) -> None:
        row[:-4] = self._statistics[number].as_vector()
        # In megatron-core's tracker micro-batches weigh the same: none has padding.
        losses: dict[str, tuple[Tensor, int | Tensor]] = {
            name: (loss, self._num_microbatches) for name, loss in tracked_losses(number).items()
        }
        losses |= self._statistics[number].losses
        for place, name in enumerate((BALANCE, Z_LOSS)):
            row[place - 4], row[place - 2] = losses.get(name, (0, 0))

    def _metrics(self, total: Tensor) -> dict[str, object]:
        """Metrics from the per-layer sums."""
        # total: [MoE layers, E + 7] float64: selections of each expert, dropped, tokens, bytes,
        # balance loss, z-loss, the weights of these two.
        experts, ffn = self._num_experts, self._config.moe.num_ffn_experts
        selected = total[:, :experts]
        dropped, tokens, num_bytes = total[:, experts:-4].T
        # A mean over micro-batches, weighted as in training. The balance loss is a sum over the
        # ranks of a data-parallel replica, the z-loss a mean over all ranks.
        weights = total[:, -2:].clamp(min=1)
        weights[:, 0] /= self._ranks_per_replica
        balance, z_loss = (total[:, -4:-2] / weights).T
        # Every token makes K selections; where one capacity serves all experts (vanilla), dropped
        # selections are those that are missing.
        selections = (tokens * self._config.moe.router_topk).unsqueeze(1)
        if self._config.moe.is_vanilla:
            dropped = selections.squeeze(1) - selected.sum(dim=1)
        share = selected / selections
        ffn_share = share[:, :ffn].sum(dim=1)
        ffn_load = share[:, :ffn].amax(dim=1) / (ffn_share / ffn).clamp(min=1e-12)
        metrics: dict[str, object] = {
            "balance_loss": float(balance.mean()),
            "ffn_fraction": float(ffn_share.mean()),
            "ffn_per_token": float((selected[:, :ffn].sum(dim=1) / tokens).mean()),
            "expert_share": share.mean(dim=0).tolist(),
            "max_ffn_load": float(ffn_load.max()),
            "dropped_fraction": float(dropped.sum() / selections.sum()),
            "a2a_bytes": int(num_bytes.sum()),
            "layer_expert_share": share.tolist(),
            "layer_ffn_fraction": ffn_share.tolist(),
        }
        if self._config.moe.z_loss_coeff is not None:
            metrics["z_loss"] = float(z_loss.mean())
        return metrics
