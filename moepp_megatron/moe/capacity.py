"""Heterogeneous expert capacities: which selections are dropped, the same in every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig


@torch.no_grad()
def within_capacity(
    gates: Tensor,
    routing_map: Tensor,
    config: MoEPPConfig,
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """The selections that each expert keeps: those with the largest gates.

    Source of the limits: arXiv 2410.07348, expert capacity.

    The limit counts the tokens of the whole micro-batch, so ranks that hold parts of its sequences
    (sequence and context parallelism) exchange their gates first. Between equal gates the token
    that comes first in the group's rank order stays.

    Args:
        gates: [T, E] fp32, local tokens, 0 where not selected.
        routing_map: [T, E] bool, local selections.
        config: Settings; `capacity_factor` must be set.
        group: Ranks that share the micro-batch (tensor x context), or None for this rank alone.

    Returns:
        [T, E] bool, True where a selection stays.
    """
    num_local = gates.shape[0]
    # Gates are never negative; -1 sorts what was not selected behind every selection.
    ranking = torch.where(routing_map, gates, -1.0)
    rank, size = 0, 1
    if group is not None and group.size() > 1:
        rank, size = group.rank(), group.size()
        gathered = ranking.new_empty(num_local * size, ranking.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, ranking.contiguous(), group=group)
        ranking = gathered
    order = ranking.argsort(dim=0, descending=True, stable=True)
    limits = torch.tensor(config.capacities(num_local * size), device=gates.device)
    positions = torch.arange(ranking.shape[0], device=gates.device)
    kept = torch.zeros_like(ranking, dtype=torch.bool)
    kept.scatter_(0, order, positions[:, None] < limits[None, :])
    return kept[rank * num_local : (rank + 1) * num_local] & routing_map
