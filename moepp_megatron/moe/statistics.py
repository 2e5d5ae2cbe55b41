"""What one MoE layer did since the last reset, counted without touching gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class RoutingStatistics:
    """Counters of one layer on one rank. Summing over all ranks gives the global batch.

    A forward pass counts when it will be differentiated. Activation recomputation runs a layer
    twice, the first time without gradients: each micro-batch is counted exactly once.

    Attributes:
        selected: [E] selections of each expert, before any capacity limit.
        wanted: [E] selections of the router before an FFN demand changed them; None without a
            demand.
        cells: [cells, 2] int64 FFN selections (as wanted) and tokens of each cell of the expert
            usage; None where none are counted.
        groups: [groups, 3] int64 FFN selections as wanted and as made, and tokens, of each group of
            token ids; None where none are counted.
        sources: [sources, E] int64 selections of the tokens of each data source, before any
            capacity limit; None where none are counted.
        dropped: Selections that a capacity limit took away.
        balance_loss: Sum over micro-batches of this rank's summands of L_b, beta excluded.
        num_tokens: Tokens seen, without padding.
        margins: [bins] int64 margins of FFN experts (`moe.margins`); None where none are counted.
        watches_margins: Whether they are to be counted.
        a2a_bytes: Bytes of hidden vectors that the dispatcher sent to other ranks, forward pass,
            dispatch and combine; a scalar on the device where only the device knows.
    """

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts
        self.num_cells = self.num_groups = self.num_sources = 0
        self.watches_margins = False
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.selected: Tensor | None = None
        self.wanted: Tensor | None = None
        self.cells: Tensor | None = None
        self.groups: Tensor | None = None
        self.sources: Tensor | None = None
        self.margins: Tensor | None = None
        self.dropped: Tensor | None = None
        self.balance_loss: Tensor | None = None
        self.num_tokens: int | Tensor = 0
        self.a2a_bytes: int | Tensor = 0

    @staticmethod
    def counts_now(training: bool) -> bool:
        """Whether the forward pass that is running counts."""
        return training and torch.is_grad_enabled()

    @torch.no_grad()
    def add_selection(
        self,
        selected: Tensor,
        num_tokens: int | Tensor,
        kept: Tensor | None = None,
        balance_loss: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> None:
        """Count one micro-batch.

        Args:
            selected: [E] int64 selections of each expert, all of them.
            num_tokens: T; a scalar on the device where some tokens are padding, which do not count.
            kept: [T, E] bool, the selections within capacity; None where nothing is dropped.
            balance_loss: Scalar, this rank's summand of L_b.
            wanted: [E] int64, what the router wanted; None where that is `selected`.
        """
        self.selected = selected if self.selected is None else self.selected + selected
        self.num_tokens = self.num_tokens + num_tokens
        if wanted is not None:
            self.wanted = wanted if self.wanted is None else self.wanted + wanted
        if kept is not None:
            dropped = selected.sum() - kept.sum()
            self.dropped = dropped if self.dropped is None else self.dropped + dropped
        if balance_loss is not None:
            loss = balance_loss.detach()
            self.balance_loss = loss if self.balance_loss is None else self.balance_loss + loss

    @torch.no_grad()
    def add_cells(self, ffn_counts: Tensor, cells: Tensor, padded: Tensor | None = None) -> None:
        """Count one micro-batch's tokens in the cells of the expert usage, of `num_cells`.

        Args:
            ffn_counts: [T] int64 FFN experts that the router wants for each token.
            cells: [T] int64.
            padded: [T] bool tokens that do not count; None for none.
        """
        tokens = torch.ones_like(ffn_counts) if padded is None else (~padded).to(ffn_counts.dtype)
        pairs = torch.stack([ffn_counts, tokens], dim=-1)
        if self.cells is None:
            self.cells = pairs.new_zeros(self.num_cells, 2)
        self.cells.index_add_(0, cells, pairs)

    def wanted_counts(self) -> Tensor | None:
        """[E] selections that the router wanted, on its device; None where none were counted."""
        return self.selected if self.wanted is None else self.wanted

    @torch.no_grad()
    def add_groups(
        self, wanted: Tensor, made: Tensor, groups: Tensor, padded: Tensor | None = None
    ) -> None:
        """Count one micro-batch's tokens in groups of token ids, of `num_groups`.

        Args:
            wanted: [T] int64 FFN experts that the router wants for each token.
            made: [T] int64 FFN experts that it gets.
            groups: [T] int64.
            padded: [T] bool tokens that do not count; None for none.
        """
        tokens = torch.ones_like(made) if padded is None else (~padded).to(made.dtype)
        rows = torch.stack([wanted, made, tokens], dim=-1)
        if self.groups is None:
            self.groups = rows.new_zeros(self.num_groups, 3)
        self.groups.index_add_(0, groups, rows)

    @torch.no_grad()
    def add_sources(self, routing_map: Tensor, sources: Tensor) -> None:
        """Count one micro-batch's selections by data source, of `num_sources`.

        Args:
            routing_map: [T, E] bool selections before any capacity limit; none of padding.
            sources: [T] int64.
        """
        if self.sources is None:
            shape = self.num_sources, self.num_experts
            self.sources = torch.zeros(shape, dtype=torch.int64, device=routing_map.device)
        self.sources.index_add_(0, sources, routing_map.long())

    @torch.no_grad()
    def add_margins(self, counts: Tensor) -> None:
        """Count one micro-batch's margins, [bins] int64."""
        self.margins = counts if self.margins is None else self.margins + counts

    @torch.no_grad()
    def as_vector(self) -> Tensor:
        """[E + 4] float64 on the device: selected, dropped, balance loss, tokens, bytes sent."""
        device = torch.cuda.current_device()
        vector = torch.zeros(self.num_experts + 4, dtype=torch.float64, device=device)
        if self.selected is not None:
            vector[: self.num_experts] = self.selected
        rest = (self.dropped, self.balance_loss, self.num_tokens, self.a2a_bytes)
        for offset, value in enumerate(rest):
            if value is not None:
                vector[self.num_experts + offset] = value
        return vector
