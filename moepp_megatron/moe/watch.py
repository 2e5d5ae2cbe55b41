"""Counts and measures what a router does; it never changes what the router returns.

A router hands every micro-batch to its `RouterWatch` in one place, after it has routed. What is
counted is switched on from outside: by tags and margins in `RoutingStatistics`, health in
`RouterHealth.enabled`.
"""

from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import count_margins
from moepp_megatron.moe.router_health import RouterHealth
from moepp_megatron.moe.selection import Routing, standardized
from moepp_megatron.moe.statistics import RoutingStatistics
from moepp_megatron.moe.token_tags import count_by_tags


class RouterWatch:
    """The counters of one router on one rank.

    Args:
        config: The layer's settings.
        fused: Whether kernels count.
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
            margins = count_margins(self._logits(chosen), bias, self._config, padded)
            self.statistics.add_margins(margins)
        if self.statistics.watches_logits:
            self.statistics.add_logits(self._logits(chosen))
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
        logits_TE = own_TE = self._logits(kept)
        if residual is not None:
            weight, previous = (part.detach().to(own_TE.dtype) for part in residual)
            # In the scale of the sum, so that it is the difference of what is compared.
            own_TE = own_TE - self._scaled(previous.reshape(own_TE.shape) @ weight.T, kept)
        self.health.add_routing(logits_TE, own_TE, kept.routing_map, bias, padded)

    def _logits(self, routing: Routing) -> Tensor:
        """[T, E] the logits that experts are selected by, without gradient."""
        assert routing.logits is not None, "a router's result has its logits"
        return self._scaled(routing.logits.detach(), routing)

    def _scaled(self, part: Tensor, routing: Routing) -> Tensor:
        """[T, E] a part of the logits as the selection scales the whole of them."""
        shape = -1, self._config.num_experts
        assert routing.logits is not None, "a router's result has its logits"
        whole_TE = routing.logits.detach().reshape(shape)
        return standardized(part.reshape(shape), self._config.logits_norm_std, whole_TE)
