"""Selections of experts, losses of routers and bytes of dispatch in one step, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from numpy.typing import NDArray
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.margins import edges
from moepp_megatron.moe.spec import router_pattern
from moepp_megatron.moe.statistics import BALANCE, Z_LOSS, tracked_losses
from moepp_megatron.training.collect import sum_over_ranks
from moepp_megatron.training.part import Part, Run, Step
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step_sums import Summand


class RoutingCounts(Part):
    """Routing metrics of one step, global over the batch and all MoE layers.

    Args:
        model: The wrapped model.
        config: The run's configuration.
        layout: The rank grid.

    Attributes:
        layer_numbers: Global numbers of all MoE layers of the model.
        is_read_each_step: Whether the selections join the read of every step; set by parts that
            need them.
    """

    def __init__(self, model: TrainingModel, config: Config, layout: Layout) -> None:
        self._config = config
        self._num_experts = config.moe.num_experts
        self._is_vanilla = config.moe.is_vanilla
        self._num_microbatches = layout.num_microbatches
        self._ranks_per_replica = layout.tp * layout.cp
        pattern = router_pattern(model.models[0].config)
        self.layer_numbers = [number for number, is_moe in enumerate(pattern, 1) if is_moe]
        self.is_read_each_step = False
        self._selections: Tensor | None = None
        self._logit_squares: Tensor | None = None
        self._watches_logits = False
        self._statistics = {
            number: statistics
            for chunk in model.models
            for number, statistics in moe_statistics(chunk).items()
        }

    @classmethod
    def of(cls, run: Run) -> RoutingCounts:
        """The part of a run."""
        return cls(run.model, run.config, run.layout)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Start counting a new step."""
        self.reset(layout.num_microbatches)

    def summands(self) -> Sequence[Summand]:
        """The selections, where a part needs them in every step."""
        return (self,) if self.is_read_each_step else ()

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, object]:
        """The routing metrics of the step; a collective."""
        return self.collect()

    def reset(self, num_microbatches: int | None = None) -> None:
        """Start counting a new step, with a new number of micro-batches if it has changed."""
        self._num_microbatches = num_microbatches or self._num_microbatches
        self._selections = self._logit_squares = None
        for statistics in self._statistics.values():
            statistics.reset()
        get_moe_metrics_tracker().clear()

    def selections(self) -> Tensor:
        """[MoE layers, E] float64 selections of the step, over all ranks.

        Every rank must call. A further call
         in the same step returns the same numbers without a collective.
        """
        if self._selections is None:
            self.take_sum(sum_over_ranks(self.summand()))
        assert self._selections is not None, "the sums have just been taken"
        return self._selections

    def watch_logits(self) -> None:
        """Measure the size of the logits from now on."""
        self._watches_logits = True
        for statistics in self._statistics.values():
            statistics.watches_logits = True

    def logits(self) -> NDArray[np.float64] | None:
        """[MoE layers] root mean square of a layer's logits in the step, over all ranks.

        None where they are not measured. Every rank must call, as for `selections`.
        """
        selected = self.selections().sum(dim=1)
        if self._logit_squares is None:
            return None
        tokens = selected / self._config.moe.router_topk
        squares = self._logit_squares / (tokens * self._num_experts).clamp(min=1.0)
        root: NDArray[np.float64] = squares.sqrt().numpy()
        return root

    def summand(self) -> Tensor:
        """[MoE layers * n] float64 on the device, of this rank (`step_sums.Summand`).

        The n numbers of a layer are the selections of E experts, and the sum of the squares of its
        logits where these are measured.
        """
        # On the device until the end: one wait for it, not one for each layer.
        device = torch.cuda.current_device()
        width = self._num_experts + self._watches_logits
        local = torch.zeros(len(self.layer_numbers), width, dtype=torch.float64, device=device)
        for row, number in enumerate(self.layer_numbers):
            counts = None
            if number in self._statistics:
                counts = self._statistics[number].selected
            if counts is not None:
                local[row, : self._num_experts] = counts
                if self._watches_logits:
                    local[row, -1] = self._statistics[number].logit_squares
        return local.reshape(-1)

    def take_sum(self, total: Tensor) -> None:
        """Note the sums over all ranks, as `summand`, for `selections` and `logits`."""
        by_layer = total.reshape(len(self.layer_numbers), -1)
        self._selections = by_layer[:, : self._num_experts]
        self._logit_squares = by_layer[:, -1] if self._watches_logits else None

    def watch_margins(self) -> None:
        """Count margins from now on."""
        for statistics in self._statistics.values():
            statistics.watches_margins = True

    def margins(self) -> Tensor:
        """[MoE layers, bins] float64 margins of the step (`moe.margins`), over all ranks.

        Every rank must call.
        """
        shape = len(self.layer_numbers), len(edges()) + 1
        local = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        for row, number in enumerate(self.layer_numbers):
            counts = self._statistics[number].margins if number in self._statistics else None
            if counts is not None:
                local[row] = counts
        return sum_over_ranks(local)

    def collect(self) -> dict[str, object]:
        """Reduce over all ranks (every rank must call) and compute the metrics of the step."""
        shape = len(self.layer_numbers), self._num_experts + 7
        local = torch.zeros(shape, dtype=torch.float64, device=torch.cuda.current_device())
        for row, number in enumerate(self.layer_numbers):
            if number in self._statistics:
                local[row, :-4] = self._statistics[number].as_vector()
                # In megatron-core's tracker micro-batches weigh the same: none has padding.
                losses: dict[str, tuple[Tensor, int | Tensor]] = {
                    name: (loss, self._num_microbatches)
                    for name, loss in tracked_losses(number).items()
                }
                losses |= self._statistics[number].losses
                for place, name in enumerate((BALANCE, Z_LOSS)):
                    local[row, place - 4], local[row, place - 2] = losses.get(name, (0, 0))
        return self._metrics(sum_over_ranks(local))

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
        if self._is_vanilla:
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
            "max_vio": float(ffn_load.mean()) - 1.0,
            "dropped_fraction": float(dropped.sum() / selections.sum()),
            "a2a_bytes": int(num_bytes.sum()),
            "layer_expert_share": share.tolist(),
            "layer_ffn_fraction": ffn_share.tolist(),
            "layer_max_vio": (ffn_load - 1.0).tolist(),
        }
        if self._config.moe.z_loss_coeff is not None:
            metrics["z_loss"] = float(z_loss.mean())
        return metrics
