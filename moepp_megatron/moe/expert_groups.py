"""Group-limited routing: a token's FFN experts come from its best groups of FFN experts.

Where groups are nodes, a token's hidden state goes to at most `group_topk` of them. The definition
is `moe.reference.in_best_groups`.
"""

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig


@torch.no_grad()
def within_groups(ranked: Tensor, affinities: Tensor, config: MoEPPConfig) -> Tensor:
    """`ranked` with -inf for FFN experts outside of a token's best groups.

    Both arguments are [T, E] fp32. A group counts by the sum of its K / `group_topk` largest
    `affinities`. `ranked` itself is returned where all groups are kept. Source: DeepSeek-V3, arXiv
    2412.19437, section 2.1.2.
    """
    if not config.limits_groups:
        return ranked
    ffn, groups, kept = config.num_ffn_experts, config.num_groups, config.group_topk
    by_group = affinities[:, :ffn].unflatten(1, (groups, ffn // groups))
    sums_TG = by_group.topk(config.router_topk // kept, dim=-1).values.sum(dim=-1)
    # Stable: between equal groups the first one, which `topk` would not promise.
    best_TM = sums_TG.argsort(dim=-1, descending=True, stable=True)[:, :kept]
    others_TG = torch.ones_like(sums_TG, dtype=torch.bool).scatter(1, best_TM, False)
    masked = ranked.clone()
    by_group = masked[:, :ffn].unflatten(1, (groups, ffn // groups))
    by_group.masked_fill_(others_TG.unsqueeze(-1), -torch.inf)
    return masked
