"""FFN experts that tokens must take, whatever the router wants.

A routing guard (`moepp_megatron.training.guard`) makes demands of layers whose router has
gone wrong, or on behalf of tokens:

- `one`: a token among whose K experts there is no FFN expert takes the best FFN expert in the place
  of its last one. Scores and gates are those that the router would have given to these K. So it is
  the selection of K experts with the largest scores among those that hold an FFN expert.
- `all`: the K best FFN experts, with the scores of a router that has no other experts (softmax
  over FFN logits alone). Where a router has collapsed, the scores of its FFN experts among all
  experts are near 0, and FFN experts weighted by them would return nothing.
- a number: zero-computation experts' logits are lowered by so much, for the selection and the gates
  alike. Infinity would be `all` and 0 `none`, so numbers lead from the one to the other without a
  step. It is the same for every token, and so in every layout.

The router's own choice is still computed: balance loss, budget and counts use it, so that a router
can be seen to become healthy again while it is overruled.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig

FFNDemand = Literal["none", "one", "all"] | float


def with_an_ffn_expert(
    chosen: Tensor, best_ffn: Tensor, num_ffn_experts: int, forced: Tensor | None
) -> Tensor:
    """The choice in which forced tokens have at least one FFN expert.

    Args:
        chosen: [T, K] int64 experts, the largest score first.
        best_ffn: [T, 1] int64 FFN expert with the largest score.
        num_ffn_experts: F.
        forced: [T] bool tokens that are concerned; None for all.

    Returns:
        [T, K] int64.
    """
    lacks_T = (chosen >= num_ffn_experts).all(dim=-1)
    if forced is not None:
        lacks_T = lacks_T & forced
    last = torch.where(lacks_T.unsqueeze(-1), best_ffn, chosen[:, -1:])
    return torch.cat([chosen[:, :-1], last], dim=-1)


def lowered(logits: Tensor, config: MoEPPConfig, by: float) -> Tensor:
    """[T, E] logits of a router whose zero-computation experts' are lower by `by`."""
    others = torch.arange(config.num_experts, device=logits.device) >= config.num_ffn_experts
    return logits - by * others.to(logits.dtype)
