"""Computes the savings against a vanilla layer of the same size.

The vanilla layer has the same FFN experts and the same K, so that every one of the K*T selections
is an FFN expert's: it computes K experts per token, and every selection takes part in the
all-to-all.
"""

import math
from dataclasses import dataclass

from moepp_megatron.workbench.report.run_data import RunConfig
from moepp_megatron.workbench.report.summary import Summary

# A gated expert (SwiGLU) has three [hidden, ffn_hidden] matrices, 2 FLOP per weight and token.
GATED_EXPERT_FLOPS_PER_WEIGHT = 6
# The released MoE++ gate's hidden width, in units of the number of experts.
TWO_LAYER_GATE_WIDTH = 8


@dataclass(frozen=True)
class LayerWork:
    """Forward work of all MoE layers for one token, FLOP.

    Attributes:
        experts_per_token: FFN experts per token in one layer.
        ffn: FFN experts.
        router: Gate and gating residual.
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
        measured: This run's work.
        vanilla: The vanilla layer's.
        ffn_fraction: FFN share, settled (see `Summary`); the work is computed from it.
        expert_work_saved: ``1 - ffn_fraction``.
        speed_limit: ``1 / ffn_fraction``; infinite if no token took an FFN expert.
        a2a_bytes: All-to-all bytes of the run, measured.
        vanilla_a2a_bytes: Bytes that the vanilla layer would have sent; None if unknown.
        step_a2a_bytes: All-to-all bytes of a step, settled.
        vanilla_step_a2a_bytes: The same of the vanilla layer.
    """

    measured: LayerWork
    vanilla: LayerWork
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
        dispatcher: `moe.dispatcher`.
        measured: Bytes of the FFN-routed selections.
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


def compute_savings(config: RunConfig, summary: Summary) -> Savings:
    """Compares a run with the vanilla layer of the same size."""
    fraction, dispatcher = summary.settled_ffn_fraction, config.moe.dispatcher
    sent, step_sent = summary.a2a_bytes, summary.settled_a2a_bytes
    topk = config.moe.router_topk
    return Savings(
        measured=LayerWork(
            experts_per_token=topk * fraction,
            ffn=_ffn_flops(config, topk * fraction),
            router=_moepp_router_flops(config),
            zero_computation=_zero_computation_flops(config),
        ),
        vanilla=LayerWork(
            experts_per_token=topk,
            ffn=_ffn_flops(config, topk),
            router=float(
                len(config.moe_layers) * 2 * config.model.hidden_size * config.experts.ffn
            ),
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
    weights = config.model.hidden_size * config.expert_ffn_hidden_size
    layers = len(config.moe_layers)
    return layers * experts_per_token * GATED_EXPERT_FLOPS_PER_WEIGHT * weights


def _moepp_router_flops(config: RunConfig) -> float:
    layers = len(config.moe_layers)
    hidden = config.model.hidden_size
    experts = config.experts.total
    if config.moe.two_layer_gate:
        gate = 2 * TWO_LAYER_GATE_WIDTH * experts * (hidden + experts)
    else:
        gate = 2 * hidden * experts
    # The first MoE layer has no logits to take over.
    residual = 2 * experts * experts * max(0, layers - 1) if config.moe.gating_residual else 0
    return float(layers * gate + residual)


def _zero_computation_flops(config: RunConfig) -> float:
    """``y = s x + A V`` with ``A`` from ``U_c x``, as if every token took part."""
    if config.experts.zero_computation == 0:
        return 0.0
    hidden = config.model.hidden_size
    constants = config.experts.constant
    per_token = 2 * hidden + 2 * constants * hidden + 4 * constants * hidden
    return float(len(config.moe_layers) * per_token)
