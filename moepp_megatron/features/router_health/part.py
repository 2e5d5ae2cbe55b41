"""Computes the router health of one step for the record from every rank's sums."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.moe.layer import decoder_moepp_layers
from moepp_megatron.moe.router_health import RouterHealth
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import Batch
from moepp_megatron.training.step_sums import sum_over_ranks, zeros


class RouterHealthPart(Part):
    """Measures the routers in one of every `interval` steps; 0 measures nothing.

    `layer_numbers` are the global numbers of all MoE layers of the wrapped model.
    """

    key = "router_health"

    def __init__(
        self, config: Config, model: TrainingModel, layer_numbers: Sequence[int], interval: int
    ) -> None:
        self._topk = config.moe.router_topk
        self._num_constants = config.moe.num_constant_experts
        self._model = model
        self._numbers = list(layer_numbers)
        self._routers = {layer.layer_number: layer.router for layer in model.layers}
        # A router in a CUDA graph repeats kernels; it has no place for further ones.
        is_captured = config.training.captures_router
        self._interval = 0 if is_captured or config.moe.is_vanilla else interval
        # There the loss comes after other micro-batches have passed the layers.
        self._sorts_losses = not config.parallel.overlap_moe_expert_parallel_comm
        # On the device, so that a micro-batch waits for none.
        self._losses = zeros(2, self._topk + 1)
        self._is_on = False
        self._fields: dict[str, Any] | None = None

    @classmethod
    def of(cls, run: PartContext) -> "RouterHealthPart":
        """The part of a run."""
        numbers = run.require(RoutingCountsPart).layer_numbers
        return cls(run.config, run.model, numbers, run.config.observe.health_interval)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Decide whether `step` is measured."""
        self._is_on = self._interval > 0 and step % self._interval == 0
        self._fields = None
        self._losses.zero_()
        for router in self._routers.values():
            router.health.reset()
            router.health.enabled = self._is_on

    def see(self, chunk: torch.nn.Module, batch: Batch, token_losses: Tensor) -> None:
        """Sort a micro-batch's token losses by the number of FFN experts per token.

        Counts are rounded means over the MoE layers of `chunk`, which, wrapped or not, has just
        made the losses [b, s]: with several stages, those of the last. `batch.loss_mask` [b, s] is
        0 for tokens that do not count.
        """
        layers = decoder_moepp_layers(chunk) if self._is_on and self._sorts_losses else []
        counts = [layer.router.health.ffn_counts for layer in layers]
        if not counts or any(count is None for count in counts):
            return
        mean_T = torch.stack([count for count in counts if count is not None]).float().mean(dim=0)
        # Tokens are ordered [s, b], and spread over the tensor ranks where there are several.
        losses, mask = (
            _own_tokens(values) for values in (token_losses.detach(), batch["loss_mask"])
        )
        buckets = mean_T.round().long()
        for row, values in enumerate((losses * mask, mask)):
            self._losses[row] += zeros(self._topk + 1).index_add_(0, buckets, values.double())

    def record(self, step: Step, fields: Fields) -> Fields:
        """Router health of a measured step."""
        return self.collect()

    def collect(self) -> dict[str, Any]:
        """Fields for the record of a measured step; empty for other steps.

        The first call in a measured step is a collective; a further one returns the same.
        """
        if not self._is_on:
            return {}
        if self._fields is None:
            self._fields = self._collect()
        return self._fields

    def _collect(self) -> dict[str, Any]:
        names = RouterHealth.names_for(self._topk)
        local = zeros(len(self._numbers), len(names))
        with self._model.gathered_parameters():
            for row, number in enumerate(self._numbers):
                if (router := self._routers.get(number)) is not None:
                    router.health.add_rows(router.logits_weight)
                    local[row] = router.health.as_vector()
        # One read for both.
        summed = sum_over_ranks(torch.cat([local.reshape(-1), self._losses.reshape(-1)]))
        total, losses = summed[: local.numel()], summed[local.numel() :].view_as(self._losses)
        layers = [dict(zip(names, row, strict=True)) for row in total.view_as(local).tolist()]
        metrics = [self._metrics(sums) for sums in layers]
        fields: dict[str, Any] = {
            "router_health": {name: [each[name] for each in metrics] for name in metrics[0]},
            "layer_ffn_histogram": [self._histogram(sums) for sums in layers],
        }
        if losses[1].sum() > 0:
            fields["loss_by_ffn"] = [_ratio(loss, count) for loss, count in losses.T.tolist()]
        return fields

    def _histogram(self, sums: dict[str, float]) -> list[float]:
        """Share of the tokens with 0, 1, ..., K FFN experts."""
        counts = range(self._topk + 1)
        return [_ratio(sums[f"tokens_with_{count}_ffn"], sums["tokens"]) for count in counts]

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The numbers of one layer; `docs/routing.md` says what each means."""

        def per(whole: str, part: str) -> float:
            return _ratio(sums[part], sums[whole])

        metrics = {
            "gate_entropy": per("tokens", "entropy"),
            "selection_margin": per("tokens", "margin"),
            "logit_variance": per("logits", "logit_square") - per("logits", "logit") ** 2,
            "own_logit_variance": per("logits", "own_logit_square")
            - per("logits", "own_logit") ** 2,
            "residual_ratio": per("own_norm", "residual_norm"),
            "row_cosine": per("copies", "row_cosine"),
            "row_cosine_max": per("copies", "row_cosine_max"),
            "balance_gradient_ratio": math.sqrt(per("model_grad_square", "balance_grad_square")),
        }
        if self._num_constants > 0:
            metrics["constant_replaced"] = per("constant_gate", "constant_replaced")
            metrics["constant_norm"] = per("copies", "constant_norm")
        return metrics


def _own_tokens(values: Tensor) -> Tensor:
    """Select this tensor rank's tokens from [b, s] values, in the layers' order."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return values.T.chunk(size)[rank].reshape(-1)


def _ratio(part: float, whole: float) -> float:
    """The ratio, or NaN for a divisor of 0: nothing was measured, and 0 would look healthy."""
    return part / whole if whole > 0 else math.nan
