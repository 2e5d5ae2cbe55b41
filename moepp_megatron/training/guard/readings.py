"""The numbers of one step that rules may look at: `config/guard_metrics.py` says what each means.

The selections are whole numbers, so their sum over ranks is exact and the same in every layout.
Router health, loss and gradient norm are not: a reduction may leave ranks with different last bits,
and ranks that decide differently hang. So all ranks judge the values of rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.config.guard_metrics import COUNTED, MEASURED
from moepp_megatron.observe.guard_judge import Values

_ENTROPY, _ENTROPY_RATIO = "gate_entropy", "gate_entropy_ratio"


def counted(selected_LE: Tensor, num_ffn: int, topk: int, wanted_share: float) -> Values:
    """The metrics of `COUNTED`, and the mean of the layers' FFN shares over the target.

    Args:
        selected_LE: [MoE layers, E] float64 selections that the routers want.
        num_ffn: F.
        topk: K.
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
        "ffn_per_token": share * topk,
        "max_ffn_load": ffn_LF.amax(dim=1) * num_ffn / ffn_total,
        "min_ffn_load": ffn_LF.amin(dim=1) * num_ffn / ffn_total,
        "max_expert_share": selected_LE.amax(dim=1) / total,
        "max_expert_tokens": selected_LE.amax(dim=1) * topk / total,
    }
    mean = float(share.mean()) / wanted_share
    return {"mean_ffn_to_target": mean} | {name: found[name].tolist() for name in COUNTED}


def measured(health: Mapping[str, Sequence[float]], num_experts: int) -> Values:
    """The metrics of `MEASURED` that a step's router health has.

    Args:
        health: `router_health` of the step's record; empty in a step without.
        num_experts: E.
    """
    found = {name: list(health[name]) for name in MEASURED if name in health}
    if _ENTROPY in found:
        largest = math.log(num_experts)
        found[_ENTROPY_RATIO] = [value / largest for value in found[_ENTROPY]]
    return dict(found)


def from_first_rank(values: Values) -> Values:
    """Rank 0's values, on every rank; one broadcast, which every rank must call.

    Args:
        values: Values by metric; every rank has the same metrics, in the same order and lengths.
    """
    flat = [
        number
        for value in values.values()
        for number in ([value] if isinstance(value, int | float) else value)
    ]
    # Float64 holds every number exactly, NaN too.
    vector = torch.tensor(flat, dtype=torch.float64, device=torch.cuda.current_device())
    dist.broadcast(vector, src=0)
    numbers = iter(vector.tolist())
    return {
        name: next(numbers)
        if isinstance(value, int | float)
        else [next(numbers) for _ in range(len(value))]
        for name, value in values.items()
    }
