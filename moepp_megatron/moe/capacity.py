"""Heterogeneous expert capacity: drops the same selections in every layout."""

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig

# Gates are compared in steps of 1 / GATE_STEPS. Tokens that are equal in exact arithmetic (the same
# token repeated at the start of a sequence, say) get gates a few 1e-7 apart, in an order that
# depends on how matrix products are blocked and so on the layout; a step is far wider than that.
GATE_STEPS = 4096


def capacities(config: MoEPPConfig, num_tokens: int) -> list[int]:
    """Most selections that each expert takes from a micro-batch of T tokens, rounded up.

    Source: arXiv 2410.07348, expert capacity.
    """
    assert config.capacity_factor is not None, "capacities need a capacity factor"
    # Exact arithmetic on the decimals that the user wrote: floating point puts 22 at
    # 22.000000000000004, which would round up to 23.
    tau, gamma = Fraction(str(config.tau)), Fraction(str(config.capacity_factor))
    weight = tau * config.num_ffn_experts + config.num_zero_computation_experts
    per_unit = gamma * config.router_topk * num_tokens / weight
    ffn, zero_computation = math.ceil(tau * per_unit), math.ceil(per_unit)
    return [ffn] * config.num_ffn_experts + [zero_computation] * config.num_zero_computation_experts


@torch.no_grad()
def within_capacity(
    gates: Tensor,
    routing_map: Tensor,
    config: MoEPPConfig,
    group: torch.distributed.ProcessGroup | None,
    context_parallel_size: int = 1,
    has_padding: bool = False,
) -> Tensor:
    """The selections that each expert keeps: those with the largest gates ([T, E] bool).

    The limit counts the tokens of the whole micro-batch, so ranks that hold parts of its sequences
    exchange their gates first. Between equal gates (to a step of 1 / GATE_STEPS; common with
    `nonzero` normalisation, where a lone FFN pick has gate 1) the token that comes first in
    [sequence position, sequence] order is kept, on whichever rank it is.

    Args:
        group: Ranks that share the micro-batch (tensor x context, tensor fastest), or None for
            this rank only.
        context_parallel_size: Ranks of the group that share out a sequence in zigzag order.
        has_padding: Whether tokens without any selection are padding, which the limit does not
            count. Their number is read on the host, which waits for it.
    """
    num_local = gates.shape[0]
    # Gates are never negative; -1 sorts what was not selected after every selection.
    ranking = torch.where(routing_map, (gates * GATE_STEPS).round(), -1.0)
    rank, size = 0, 1
    if group is not None and group.size() > 1:
        rank, size = group.rank(), group.size()
        gathered = ranking.new_empty(num_local * size, ranking.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, ranking.contiguous(), group=group)
        ranking = in_sequence_order(gathered, context_parallel_size)
    order = ranking.argsort(dim=0, descending=True, stable=True)
    num_tokens = num_local * size
    if has_padding:
        num_tokens = int((ranking >= 0).any(dim=1).sum())
    limits = _capacity_limits(tuple(capacities(config, num_tokens)), gates.device)
    positions = torch.arange(ranking.shape[0], device=gates.device)
    kept = torch.zeros_like(ranking, dtype=torch.bool)
    kept.scatter_(0, order, positions[:, None] < limits[None, :])
    kept = in_rank_order(kept, context_parallel_size)
    return kept[rank * num_local : (rank + 1) * num_local] & routing_map


@functools.lru_cache(maxsize=64)
def _capacity_limits(capacities_E: tuple[int, ...], device: torch.device) -> Tensor:
    """[E] int64 limits on the device; kept, since a copy to it makes the host wait."""
    return torch.tensor(capacities_E, device=device)


def in_sequence_order(values: Tensor, context_parallel_size: int) -> Tensor:
    """Reorder [T, ...] from the order of ranks, with zigzag chunks, to that of the sequence."""
    if context_parallel_size == 1:
        return values
    early, late = values.unflatten(0, (context_parallel_size, 2, -1)).unbind(dim=1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def in_rank_order(values: Tensor, context_parallel_size: int) -> Tensor:
    """The inverse of `in_sequence_order`."""
    if context_parallel_size == 1:
        return values
    early, late = values.unflatten(0, (2, context_parallel_size, -1))
    return torch.stack([early, late.flip(0)], dim=1).flatten(0, 2)
