"""Counters of one MoE layer since the last reset, outside of autograd."""

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import count_margins
from moepp_megatron.moe.router_health import RouterHealth
from moepp_megatron.moe.selection import Routing, standardized
from moepp_megatron.moe.token_tags import TagCounts, count_by_tags

BALANCE, Z_LOSS = "balance", "z"
# Their names in megatron-core's tracker; a model has one kind of balance loss.
_TRACKED = {"load_balancing_loss": BALANCE, "seq_load_balancing_loss": BALANCE, "z_loss": Z_LOSS}


def tracked_losses(layer_number: int) -> dict[str, Tensor]:
    """Losses of a layer in megatron-core's tracker, each a scalar on the device, by our names."""
    losses: dict[str, Tensor] = {}
    for tracked, name in _TRACKED.items():
        entry = get_moe_metrics_tracker().metrics.get(tracked)
        if entry is not None:
            value = entry.values[layer_number - 1].detach()
            # A copy, for the tracker adds in place.
            losses[name] = value.clone() if name not in losses else losses[name] + value
    return losses


class RoutingStatistics:
    """Counters of one layer on one rank. Summing over all ranks gives the global batch.

    A forward pass counts when it will be differentiated. Activation recomputation runs a layer
    twice, the first time without gradients: each micro-batch is counted exactly once.

    Attributes:
        selected: [E] selections of each expert, before any capacity limit.
        tagged: Tokens and selections by the tokens' tags; None where none are counted.
        num_groups, num_sources: How many there are to count by; 0 for no count.
        dropped: Selections that a capacity limit took away.
        losses: By name (`BALANCE`, `Z_LOSS`), the sum of what `add_loss` got, and of its weights.
        margins: [bins] int64 margins of FFN experts (`moe.margins`); None where none are counted.
        watches_margins: Whether they are to be counted.
        logit_norms: Norm of each micro-batch's logits, where `watches_logits`.
        fill: Most FFN rows of a micro-batch for one rank, of the rows that static rows allow it:
            a float64 scalar on the device; None without static rows.
        a2a_bytes: Bytes of hidden vectors that the dispatcher sent to other ranks, forward pass,
            dispatch and combine; a scalar on the device where only the device knows.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_groups = self.num_sources = 0
        self.watches_margins = self.watches_logits = False
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.selected: Tensor | None = None
        self.tagged: TagCounts | None = None
        self.margins: Tensor | None = None
        self.logit_norms: list[Tensor] = []
        self.dropped: Tensor | None = None
        self.losses: dict[str, tuple[Tensor, int | Tensor]] = {}
        self.num_tokens: int | Tensor = 0
        self.a2a_bytes: int | Tensor = 0
        self.fill: Tensor | None = None

    @staticmethod
    def is_counting(training: bool) -> bool:
        """True if the current forward pass is counted."""
        return training and torch.is_grad_enabled()

    @torch.no_grad()
    def add_selection(
        self, selected: Tensor, num_tokens: int | Tensor, kept: Tensor | None = None
    ) -> None:
        """Count one micro-batch.

        `selected` is [E] int64 selections. `num_tokens` is a scalar on the device where some tokens
        are padding, which do not count. `kept` is [T, E] bool, None where nothing is dropped.
        """
        self.selected = selected if self.selected is None else self.selected + selected
        self.num_tokens = self.num_tokens + num_tokens
        if kept is not None:
            dropped = selected.sum() - kept.sum()
            self.dropped = dropped if self.dropped is None else self.dropped + dropped

    @torch.no_grad()
    def add_loss(self, name: str, loss: Tensor, num_tokens: Tensor | None = None) -> None:
        """Count a micro-batch's loss (`BALANCE` or `Z_LOSS`) with its weight in training.

        `loss` is this rank's summand of L_b, or the z-loss of its tokens, without factor.
        `num_tokens` are its tokens where some are padding; None counts as 1, for micro-batches of
        equal size.
        """
        loss, weight = loss.detach(), 1 if num_tokens is None else num_tokens
        if num_tokens is not None:
            loss = loss * num_tokens
        if name in self.losses:
            total, weights = self.losses[name]
            loss, weight = total + loss, weights + weight
        self.losses[name] = loss, weight

    @property
    def balance_loss(self) -> Tensor | None:
        """Mean over micro-batches of this rank's summands of L_b, beta excluded; or None."""
        if BALANCE not in self.losses:
            return None
        total, weight = self.losses[BALANCE]
        return total / weight

    def counts_by_tags(self, device: torch.device) -> TagCounts | None:
        """Counters to add to, created on first use; None if nothing is counted by tags."""
        sizes = self.num_groups, self.num_sources
        if self.tagged is None and any(sizes):
            self.tagged = TagCounts.zeros(*sizes, self.num_experts, device)
        return self.tagged

    @property
    def groups(self) -> Tensor | None:
        """[groups, 2] int64 FFN selections and tokens of each group; or None."""
        return self.tagged.groups if self.tagged and self.num_groups else None

    @property
    def sources(self) -> Tensor | None:
        """[sources, E] int64 selections of each data source's tokens; or None."""
        return self.tagged.sources if self.tagged and self.num_sources else None

    def add_fill(self, fill: Tensor) -> None:
        """Note one micro-batch's `fill`."""
        self.fill = fill if self.fill is None else torch.maximum(self.fill, fill)

    @torch.no_grad()
    def add_margins(self, counts: Tensor) -> None:
        """Count one micro-batch's margins, [bins] int64."""
        self.margins = counts if self.margins is None else self.margins + counts

    @torch.no_grad()
    def add_logits(self, logits: Tensor) -> None:
        """Measure one micro-batch's logits, of any shape; those of padding are 0."""
        # One kernel, where the sum of their squares would be three.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.logit_norms.append(torch.linalg.vector_norm(logits, dtype=dtype))

    @torch.no_grad()
    def as_vector(self) -> Tensor:
        """[E + 3] float64 on the device: selected, dropped, tokens, bytes sent."""
        device = torch.cuda.current_device()
        vector = torch.zeros(self.num_experts + 3, dtype=torch.float64, device=device)
        if self.selected is not None:
            vector[: self.num_experts] = self.selected
        rest = (self.dropped, self.num_tokens, self.a2a_bytes)
        for offset, value in enumerate(rest):
            if value is not None:
                vector[self.num_experts + offset] = value
        return vector


class RouterWatch:
    """The counters of one router on one rank; they never change what the router returns.

    A router hands every micro-batch to its watch in one place, after it has routed. Counters are
    switched on from outside: by tags and margins in `RoutingStatistics`, health in
    `RouterHealth.enabled`. With `fused`, kernels count.
    """

    def __init__(self, config: MoEPPConfig, fused: bool) -> None:
        self._config, self._fused = config, fused
        self.statistics = RoutingStatistics(config.num_experts)
        self.health = RouterHealth(config)

    def see(
        self,
        chosen: Routing,
        kept: Routing,
        num_tokens: int | Tensor,
        *,
        training: bool,
        bias: Tensor | None,
        residual: tuple[Tensor, Tensor] | None,
        padded: Tensor | None,
        tags: Tensor | None,
    ) -> None:
        """Count one micro-batch.

        Args:
            chosen: What its logits select; `counts` is None in a pass that will be repeated.
            kept: The same within capacity.
            num_tokens: Tokens without padding.
            training: Whether the model trains.
            bias: [E] bias of the selection, or None.
            residual: [E, E] weight of the gating residual and [s, b, E] logits of the MoE layer
                before; None without a residual.
            padded: [T] bool tokens that are padding; None for none.
            tags: [s, b] tags from `token_tags`, or None.
        """
        measures = self.health.enabled and training
        if chosen.counts is None:
            if measures:
                self.health.count_ffn(kept.routing_map)
            return
        counts_SE = chosen.counts
        selected_E = (counts_SE[0] if len(counts_SE) == 1 else counts_SE.sum(dim=0)).long()
        within = None if self._config.capacity_factor is None else kept.routing_map
        self.statistics.add_selection(selected_E, num_tokens, within)
        if tags is not None:
            self._count_tags(chosen, tags, padded)
        if self.statistics.watches_margins:
            assert bias is not None, "margins are counted for the controller of a bias"
            margins = count_margins(self._scaled(chosen), bias, self._config, padded)
            self.statistics.add_margins(margins)
        if self.statistics.watches_logits:
            self.statistics.add_logits(self._scaled(chosen))
        if measures:
            self._measure(kept, bias, residual, padded)

    def _count_tags(self, chosen: Routing, tags: Tensor, padded: Tensor | None) -> None:
        counts = self.statistics.counts_by_tags(tags.device)
        if counts is None:
            return
        count = count_by_tags
        if self._fused:
            from moepp_megatron.moe.kernels.tags import count_by_tags as count
        num_ffn = self._config.num_ffn_experts
        count(counts, chosen.routing_map, tags, num_ffn, padded)

    def _measure(
        self,
        kept: Routing,
        bias: Tensor | None,
        residual: tuple[Tensor, Tensor] | None,
        padded: Tensor | None,
    ) -> None:
        logits_TE = own_TE = self._scaled(kept)
        if residual is not None:
            weight, previous = (part.detach().to(own_TE.dtype) for part in residual)
            # In the scale of the sum, so that it is the difference of what is compared.
            own_TE = own_TE - self._scaled(kept, previous.reshape(own_TE.shape) @ weight.T)
        self.health.add_routing(logits_TE, own_TE, kept.routing_map, bias, padded)

    def _scaled(self, routing: Routing, part: Tensor | None = None) -> Tensor:
        """[T, E] the logits that experts are selected by, without gradient, or a part of them."""
        assert routing.logits is not None, "a router's result has its logits"
        whole_TE = routing.logits.detach().reshape(-1, self._config.num_experts)
        part_TE = whole_TE if part is None else part.reshape(whole_TE.shape)
        return standardized(part_TE, self._config.logits_norm_std, whole_TE)
