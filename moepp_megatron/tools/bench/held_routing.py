"""Routing held at perfect balance: FFN experts get exactly the share phi of all selections.

Untrained routers are far from balance, and a benchmark must not depend on how far. So fixed numbers
are added to each token's logits. They decide who is selected; the router still does all its work,
and softmax keeps enough spread that no gradient vanishes.
"""

from typing import Any

import torch
from torch import Tensor

from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.runtime.patches import replace

# Selected experts stand this far above the others.
MARGIN = 6.0


def balanced_selection(
    num_tokens: int, weights: Tensor, topk: int, generator: torch.Generator
) -> Tensor:
    """Return [T, K] int64: K different experts for each token, each expert as often as its share.

    `weights` [E] are shares of the K T selections, each at most 1 / K, with sum 1; `generator`
    decides which tokens go where.
    """
    total = num_tokens * topk
    ends = (weights.double().cumsum(0) * total).round().long()
    ends[-1] = total
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    assert int(counts.max()) <= num_tokens, f"an expert cannot be selected by {counts.max()} tokens"
    deck = torch.repeat_interleave(torch.arange(len(weights)), counts)
    picks = deck[torch.randperm(total, generator=generator)].view(num_tokens, topk)
    while True:
        ordered = picks.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1).nonzero().flatten()
        if len(twice) == 0:
            return picks
        # Tokens that hold an expert twice exchange a pick with any others.
        others = torch.randperm(num_tokens, generator=generator)[: len(twice)]
        rows = torch.cat([twice, others]).unique()
        cards = picks[rows].flatten()
        picks[rows] = cards[torch.randperm(len(cards), generator=generator)].view(-1, topk)


def balanced_shares(num_ffn: int, num_zero_computation: int, tau: float) -> Tensor:
    """[E] each expert's share of selections where the balance loss is least."""
    weights = torch.tensor([tau] * num_ffn + [1.0] * num_zero_computation, dtype=torch.float64)
    return weights / weights.sum()


def hold(router: Any, picks: Tensor) -> None:
    """Make `router`, a `TopKRouter`, select `picks` [T, K] for the tokens of its next calls."""
    # The last step of our gate, which may be one product with the constant experts' weights.
    name = "second_layer" if isinstance(router, MoEPPRouter) else "gating"
    original = getattr(router, name)
    num_experts = router.weight.shape[0]
    offsets = torch.zeros(len(picks), num_experts).scatter(1, picks, MARGIN)
    offsets = offsets.to(router.weight.device)

    def held(hidden: Tensor) -> Tensor:
        logits = original(hidden)
        return logits + offsets.view(logits.shape).to(logits.dtype)

    replace(router, name, held)
