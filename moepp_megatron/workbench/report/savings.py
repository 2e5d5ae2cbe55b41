"""Computes the savings against a vanilla layer of the same size.

The vanilla layer has the same FFN experts and the same K, so that every one of the K*T selections
is an FFN expert's: it computes K experts per token, and every selection takes part in the
all-to-all.
"""

import math
from dataclasses import dataclass

from moepp_megatron.experts import FFN, ExpertLayout
from moepp_megatron.workbench.report.run_data import RunConfig
from moepp_megatron.workbench.report.summary import RunSummary


@dataclass(frozen=True)
class _LayerWork:
    """Forward work of all MoE layers for one token, FLOP.

    Attributes:
        experts_per_token: FFN experts per token in one layer.
        zero_computation: The closed form of the zero-computation experts.
    """

    experts_per_token: float
    ffn: float
    router: float
    zero_computation: float

    @property
    def total(self) -> float:
        """The work of all parts."""
        return self.ffn + self.router + self.zero_computation


@dataclass(frozen=True)
class Savings:
    """A run against the vanilla layer of the same size.

    Attributes:
        ffn_fraction: FFN share, settled (see `RunSummary`); the work is computed from it.
        expert_work_saved: ``1 - ffn_fraction``.
        speed_limit: ``1 / ffn_fraction``; infinite if no token took an FFN expert.
        a2a_bytes: All-to-all bytes of the run, measured.
        vanilla_a2a_bytes: Bytes that the vanilla layer would have sent; None if unknown.
        step_a2a_bytes: All-to-all bytes of a step, settled.
        vanilla_step_a2a_bytes: The same of the vanilla layer.
    """

    measured: _LayerWork
    vanilla: _LayerWork
    ffn_fraction: float
    expert_work_saved: float
    speed_limit: float
    a2a_bytes: float
    vanilla_a2a_bytes: float | None
    step_a2a_bytes: float
    vanilla_step_a2a_bytes: float | None


def vanilla_a2a_bytes(dispatcher: str, measured: float, ffn_fraction: float) -> float | None:
    """All-to-all bytes if every selection went to an FFN expert, in the same layout.

    Args:
        ffn_fraction: Their share of all selections.

    Returns:
        Bytes, or None where they cannot be known: where no selection was FFN-routed, so that there
        is nothing to scale up, and where several selections of a token may travel as one vector.
    """
    if dispatcher == "allgather":
        # Every token goes everywhere, whatever its experts.
        return measured
    if dispatcher != "alltoall" or not ffn_fraction > 0:
        return None
    return measured / ffn_fraction


def compute_savings(config: RunConfig, summary: RunSummary) -> Savings:
    """Compares a run with the vanilla layer of the same size."""
    fraction, dispatcher = summary.settled_ffn_fraction, config.moe.dispatcher
    sent, step_sent = summary.a2a_bytes, summary.settled_a2a_bytes
    topk = config.moe.router_topk
    return Savings(
        measured=_LayerWork(
            experts_per_token=topk * fraction,
            ffn=_ffn_flops(config, topk * fraction),
            router=_router_flops(config, config.experts),
            zero_computation=float(
                len(config.moe_layers) * config.experts.local_flops(config.model.hidden_size)
            ),
        ),
        vanilla=_LayerWork(
            experts_per_token=topk,
            ffn=_ffn_flops(config, topk),
            router=_router_flops(config, config.experts.vanilla),
            zero_computation=0.0,
        ),
        ffn_fraction=fraction,
        expert_work_saved=1.0 - fraction,
        speed_limit=1.0 / fraction if fraction > 0 else math.inf,
        a2a_bytes=sent,
        vanilla_a2a_bytes=vanilla_a2a_bytes(dispatcher, sent, summary.ffn_fraction),
        step_a2a_bytes=step_sent,
        vanilla_step_a2a_bytes=vanilla_a2a_bytes(dispatcher, step_sent, fraction),
    )


def _ffn_flops(config: RunConfig, experts_per_token: float) -> float:
    each = FFN.flops(config.model.hidden_size, config.expert_ffn_hidden_size)
    return len(config.moe_layers) * experts_per_token * each


def _router_flops(config: RunConfig, experts: ExpertLayout) -> float:
    layers, hidden = range(len(config.moe_layers)), config.model.hidden_size
    return float(sum(2 * experts.router_parameters(hidden, is_first=i == 0) for i in layers))
