"""The table that compares a run with the vanilla layer of the same size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.run_data import RunData
from moepp_megatron.workbench.report.savings import Savings
from moepp_megatron.workbench.report.summary import RunSummary


@dataclass(frozen=True)
class SavingsRow:
    """One row: a quantity of the vanilla layer, of this run, and the saving.

    Attributes:
        name: The quantity.
        how: How it is computed.
        vanilla: Formatted value of the vanilla layer.
        measured: Formatted value of this run.
        saved: The difference as a share of the vanilla value, in bytes for a total of the run.
        strong: Whether it is a sum or a result.
    """

    name: str
    how: str
    vanilla: str
    measured: str
    saved: str
    strong: bool = False


@dataclass(frozen=True)
class SavingsTable:
    """Rows and the sentences below them."""

    rows: list[SavingsRow]
    notes: list[str]


def savings_table(run: RunData, summary: RunSummary, savings: Savings) -> SavingsTable:
    """The comparison, for a layer that has zero-computation experts."""
    rows = [*_work_rows(run, savings), *_traffic_rows(run, summary, savings)]
    notes = [
        f"The vanilla layer has the same {run.config.experts.num_ffn_experts} FFN experts and the "
        f"same K = {run.config.moe.router_topk}, all of which are FFN experts. Work is that of one "
        f"token, forward, in all {len(run.config.moe_layers)} MoE layers; the backward pass of "
        "the experts costs twice as much on both sides. Shares and bytes of a step are means over "
        f"the last tenth of the records ({summary.window}), in which the FFN share was "
        f"{formatting.percent(savings.ffn_fraction)}.",
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
    return SavingsTable(rows, notes)


def _work_rows(run: RunData, savings: Savings) -> list[SavingsRow]:
    vanilla, measured = savings.vanilla, savings.measured
    config = run.config
    gate = "2 x 8E (D + E)" if config.moe.two_layer_gate else "2 D E"
    residual = ", and 2 E^2 for the gating residual" if config.moe.gating_residual else ""
    constants = config.experts.num_constant_experts
    return [
        SavingsRow(
            "FFN experts a token takes",
            "K; K x FFN share",
            formatting.number(vanilla.experts_per_token, 2),
            formatting.number(measured.experts_per_token, 2),
            formatting.percent(savings.expert_work_saved),
        ),
        _difference(
            "FFN expert work",
            "6 D H for each FFN expert taken: three matrices of a gated expert, 2 FLOP a weight",
            vanilla.ffn,
            measured.ffn,
            formatting.flops,
        ),
        _difference(
            "Router work",
            f"2 D F of vanilla; {gate}{residual} here",
            vanilla.router,
            measured.router,
            formatting.flops,
        ),
        _difference(
            "Zero-computation experts",
            f"2 D + 6 D x {constants} constant experts, as if every token took them",
            0.0,
            measured.zero_computation,
            formatting.flops,
        ),
        _difference(
            "All of the layer's work",
            "sum of the three",
            vanilla.total,
            measured.total,
            formatting.flops,
            strong=True,
        ),
    ]


def _traffic_rows(run: RunData, summary: RunSummary, savings: Savings) -> list[SavingsRow]:
    steps = summary.last_step
    if not savings.a2a_bytes:
        reason = "no hidden vector left its rank in this run"
        return [SavingsRow("All-to-all bytes", reason, "none", "none", "none")]
    if savings.vanilla_a2a_bytes is None:
        reason = (
            f"the vanilla layer's traffic does not follow from this run's (moe.dispatcher: "
            f"{run.config.moe.dispatcher}, FFN share {formatting.percent(savings.ffn_fraction)})"
        )
        sent = formatting.data_size(savings.a2a_bytes)
        return [SavingsRow("All-to-all bytes of the run", reason, "not known", sent, "not known")]
    rule = "the same" if run.config.moe.dispatcher == "allgather" else "measured / FFN share"
    how = f"forward, all ranks and MoE layers; vanilla: {rule}, in the same layout"
    rows = []
    if savings.vanilla_step_a2a_bytes is not None:
        rows.append(
            _difference(
                "All-to-all bytes per step",
                how,
                savings.vanilla_step_a2a_bytes,
                savings.step_a2a_bytes,
                formatting.data_size,
            )
        )
    # The early steps are in it, so that its share of vanilla is another; bytes cannot be confused.
    saved = formatting.data_size(savings.vanilla_a2a_bytes - savings.a2a_bytes)
    total = f"mean of all records x steps done ({steps:,}), so with the run's first steps"
    whole, sent = map(formatting.data_size, (savings.vanilla_a2a_bytes, savings.a2a_bytes))
    return [
        *rows,
        SavingsRow("All-to-all bytes of the run", total, whole, sent, saved, strong=True),
    ]


def _difference(
    name: str,
    how: str,
    vanilla: float,
    measured: float,
    show: Callable[[float], str],
    *,
    strong: bool = False,
) -> SavingsRow:
    saved = "added"
    if vanilla > 0:
        ratio = measured / vanilla
        saved = formatting.percent(1.0 - ratio)
        if ratio > 1.0:
            saved = f"{formatting.percent(ratio - 1.0)} more"
    return SavingsRow(name, how, show(vanilla), show(measured), saved, strong)
