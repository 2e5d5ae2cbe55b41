"""How a selection bias learns: LongCat-Flash's rule towards a share of FFN selections."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_step(shares_LE: Tensor, wanted: float, num_ffn_experts: int, rate: float) -> Tensor:
    """`delta b_i = mu (K_e/K * 1/F - T_i / (K T_all))` on FFN experts, 0 on the others.

    Source: LongCat-Flash (arXiv 2509.01322).

    Args:
        shares_LE: [L, E] each expert's share of a layer's selections, T_i / (K T_all).
        wanted: K_e/K, the target of the FFN experts' share.
        num_ffn_experts: F.
        rate: mu.

    Returns:
        [L, E] fp32.
    """
    step_LE = torch.zeros(shares_LE.shape)
    ffn = slice(0, num_ffn_experts)
    step_LE[:, ffn] = (rate * (wanted / num_ffn_experts - shares_LE[:, ffn])).float()
    return step_LE
