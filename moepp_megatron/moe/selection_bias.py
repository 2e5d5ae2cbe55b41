"""How a selection bias learns: LongCat-Flash's rule towards a share of FFN selections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import MoEPPLayer


def bias_step(selected_E: Tensor, config: MoEPPConfig, rate: float) -> Tensor:
    """`delta b_i = mu (K_e/K * 1/F - T_i / (K T_all))` on FFN experts, 0 on the others.

    Source: LongCat-Flash (arXiv 2509.01322), with K_e/K, the wanted share of FFN selections, read
    as phi, the share that perfect balance under `tau` gives.

    Args:
        selected_E: [E] selections of each expert over the global batch.
        config: Gives F and phi.
        rate: mu.

    Returns:
        [E] fp32.
    """
    selected_E = selected_E.float()
    step_E = torch.zeros_like(selected_E)
    ffn = slice(0, config.num_ffn_experts)
    wanted = config.ffn_share / config.num_ffn_experts
    step_E[ffn] = rate * (wanted - selected_E[ffn] / selected_E.sum())
    return step_E


@torch.no_grad()
def update_selection_bias(
    chunks: Iterable[torch.nn.Module],
    rate: float,
    group: torch.distributed.ProcessGroup | None,
) -> None:
    """Move the selection bias of every MoE++ layer by what the step's selections ask for.

    Call after the optimizer's step, before the layers' statistics are reset.

    Args:
        chunks: This rank's model chunks.
        rate: mu.
        group: Ranks that hold other tokens of the same layers (tensor x context x data).
    """
    layers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, MoEPPLayer)]
    if not layers:
        return
    counts = torch.stack([_selected(layer) for layer in layers])
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(counts, group=group)
    for layer, selected_E in zip(layers, counts, strict=True):
        bias = layer.router.expert_bias
        assert bias is not None, f"MoE layer {layer.layer_number} has no selection bias"
        bias.add_(bias_step(selected_E, layer.moepp, rate))


def _selected(layer: MoEPPLayer) -> Tensor:
    """[E] int64 selections on this rank since the last reset."""
    selected = layer.statistics.selected
    assert selected is not None, f"MoE layer {layer.layer_number} counted nothing in this step"
    return selected
