"""Numbers of one step that rules may look at: `catalogue.py` says what each means.

The selections are whole numbers, so their sum over ranks is exact and the same in every layout.
"""

from __future__ import annotations

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
