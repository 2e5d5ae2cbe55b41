"""The savings against a vanilla layer of the same size, and their table.

The vanilla layer has the same FFN experts and the same K, so that every one of the K*T selections
is an FFN expert's: it computes K experts per token, and every selection takes part in the
all-to-all.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.experts import FFN, ExpertLayout
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Cell, Table, number
from moepp_megatron.tools.report.run_data import RunConfig, RunData
from moepp_megatron.tools.report.summary import RunSummary

_HEAD = ("Quantity", "Vanilla layer", "This run", "Saved", "How it is computed")
_ALL_WORK, _ALL_BYTES = "All of the layer's work", "All-to-all bytes of the run"
Row = list[Cell]


@dataclass(frozen=True)
class _LayerWork:
    """Forward work of all MoE layers for one token, FLOP."""

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
        ffn_fraction: FFN share of the tail (see `RunSummary`); the work is computed from it.
        expert_work_saved: ``1 - ffn_fraction``.
        speed_limit: ``1 / ffn_fraction``; infinite if no token took an FFN expert.
        a2a_bytes: All-to-all bytes of the run, measured.
        vanilla_a2a_bytes: Bytes that the vanilla layer would have sent; None if unknown.
        step_a2a_bytes: All-to-all bytes of a step of the tail.
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
    fraction, dispatcher = summary.tail_ffn_fraction, config.moe.dispatcher
    sent, step_sent = summary.a2a_bytes, summary.tail_a2a_bytes
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


def savings_table(run: RunData, summary: RunSummary, savings: Savings) -> Table:
    """The comparison, for a layer that has zero-computation experts.

    Its columns: the quantity, that of the vanilla layer, of this run, the difference as a share of
    the vanilla value (in bytes for a total of the run), and how it is computed.
    """
    rows = [*_work_rows(run, savings), *_traffic_rows(run, summary, savings)]
    notes = [
        f"The vanilla layer has the same {run.config.experts.num_ffn_experts} FFN experts and the "
        f"same K = {run.config.moe.router_topk}, all of which are FFN experts. Work is that of one "
        f"token, forward, in all {len(run.config.moe_layers)} MoE layers; the backward pass of "
        "the experts costs twice as much on both sides. Shares and bytes of a step are means over "
        f"the last tenth of the records ({summary.window}), in which the FFN share was "
        f"{formatting.percent(savings.ffn_fraction)}."
    ]
    if math.isfinite(savings.speed_limit):
        notes.append(
            f"{formatting.number(savings.speed_limit, 2)} = 1 / FFN share is the most that the "
            "expert computation can gain in speed. It is a limit, not a measurement."
        )
    if summary.dropped_fraction > 0:
        notes.append(
            f"A capacity limit dropped {formatting.percent(summary.dropped_fraction)} of the "
            "selections there; what that saved is not counted here, on either side."
        )
    sums = [place for place, row in enumerate(rows) if row[0].text in (_ALL_WORK, _ALL_BYTES)]
    return Table(_HEAD, rows, " ".join(notes), strong=sums)


def _row(name: str, how: str, vanilla: str, measured: str, saved: str) -> Row:
    return [Cell(name), number(vanilla), number(measured), number(saved), Cell(how, "comment")]


def _work_rows(run: RunData, savings: Savings) -> list[Row]:
    vanilla, measured = savings.vanilla, savings.measured
    config = run.config
    gate = "2 x 8E (D + E)" if config.moe.two_layer_gate else "2 D E"
    residual = ", and 2 E^2 for the gating residual" if config.moe.gating_residual else ""
    constants = config.experts.num_constant_experts
    ffn = "6 D H for each FFN expert taken: three matrices of a gated expert, 2 FLOP a weight"
    router = f"2 D F of vanilla; {gate}{residual} here"
    others = f"2 D + 6 D x {constants} constant experts, as if every token took them"
    work = (
        ("FFN expert work", ffn, vanilla.ffn, measured.ffn),
        ("Router work", router, vanilla.router, measured.router),
        ("Zero-computation experts", others, 0.0, measured.zero_computation),
        (_ALL_WORK, "sum of the three", vanilla.total, measured.total),
    )
    return [
        _row(
            "FFN experts a token takes",
            "K; K x FFN share",
            formatting.number(vanilla.experts_per_token, 2),
            formatting.number(measured.experts_per_token, 2),
            formatting.percent(savings.expert_work_saved),
        ),
        *(_difference(name, how, old, new, formatting.flops) for name, how, old, new in work),
    ]


def _traffic_rows(run: RunData, summary: RunSummary, savings: Savings) -> list[Row]:
    steps = summary.last_step
    if not savings.a2a_bytes:
        reason = "no hidden vector left its rank in this run"
        return [_row("All-to-all bytes", reason, "none", "none", "none")]
    if savings.vanilla_a2a_bytes is None:
        reason = (
            f"the vanilla layer's traffic does not follow from this run's (moe.dispatcher: "
            f"{run.config.moe.dispatcher}, FFN share {formatting.percent(savings.ffn_fraction)})"
        )
        sent = formatting.data_size(savings.a2a_bytes)
        return [_row(_ALL_BYTES, reason, "not known", sent, "not known")]
    rule = "the same" if run.config.moe.dispatcher == "allgather" else "measured / FFN share"
    how = f"forward, all ranks and MoE layers; vanilla: {rule}, in the same layout"
    rows = []
    if savings.vanilla_step_a2a_bytes is not None:
        pair = savings.vanilla_step_a2a_bytes, savings.step_a2a_bytes
        rows.append(_difference("All-to-all bytes per step", how, *pair, formatting.data_size))
    # The early steps are in it, so that its share of vanilla is another; bytes cannot be confused.
    saved = formatting.data_size(savings.vanilla_a2a_bytes - savings.a2a_bytes)
    total = f"mean of all records x steps done ({steps:,}), so with the run's first steps"
    whole, sent = map(formatting.data_size, (savings.vanilla_a2a_bytes, savings.a2a_bytes))
    return [*rows, _row(_ALL_BYTES, total, whole, sent, saved)]


def _difference(
    name: str, how: str, vanilla: float, measured: float, show: Callable[[float], str]
) -> Row:
    saved = "added"
    if vanilla > 0:
        ratio = measured / vanilla
        saved = formatting.percent(1.0 - ratio)
        if ratio > 1.0:
            saved = f"{formatting.percent(ratio - 1.0)} more"
    return _row(name, how, show(vanilla), show(measured), saved)
