"""The numbers of one step that rules may look at: `catalogue.py` says what each means.

The selections are whole numbers, so their sum over ranks is exact and the same in every layout.
Router health, loss and gradient norm are not: a reduction may leave ranks with different last bits,
and ranks that decide differently hang. So all ranks judge the values of rank 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.observe.guard_judge import Values


def counted(selected_LE: Tensor, num_ffn: int, wanted_share: float) -> Values:
    """The metrics of `COUNTED`, and the mean of the layers' FFN shares over the target.

    Args:
        selected_LE: [MoE layers, E] float64 selections that the routers want.
        num_ffn: F.
        wanted_share: Target of the FFN share of all selections.

    Returns:
        A list over the MoE layers for each. Values that are undefined are NaN: loads without any
        FFN selection, everything without a selection.
    """
    total = selected_LE.sum(dim=1)
    ffn_LF = selected_LE[:, :num_ffn]
    ffn_total = ffn_LF.sum(dim=1)
    share = ffn_total / total
    found = {
        "ffn_fraction": share,
        "ffn_to_target": share / wanted_share,
        "max_ffn_load": ffn_LF.amax(dim=1) * num_ffn / ffn_total,
        "min_ffn_load": ffn_LF.amin(dim=1) * num_ffn / ffn_total,
        "max_expert_share": selected_LE.amax(dim=1) / total,
    }
    mean = float(share.mean()) / wanted_share
    return {"mean_ffn_to_target": mean} | {name: row.tolist() for name, row in found.items()}


def from_first_rank(values: Values) -> Values:
    """Rank 0's values, on every rank; one broadcast, which every rank must call.

    Args:
        values: Values by metric; every rank has the same metrics, in the same order and lengths.
    """
    # Float64 holds every number exactly, NaN too.
    own = [torch.tensor(value, dtype=torch.float64) for value in values.values()]
    vector = torch.cat([each.reshape(-1) for each in own]).to(torch.cuda.current_device())
    dist.broadcast(vector, src=0)
    parts = vector.cpu().split([each.numel() for each in own])
    shaped = (part.view_as(each).tolist() for part, each in zip(parts, own, strict=True))
    return dict(zip(values, shaped, strict=True))
