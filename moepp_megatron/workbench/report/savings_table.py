"""The table that compares a run with the vanilla layer of the same size."""

import math
from collections.abc import Callable

from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.blocks import Cell, Table, number
from moepp_megatron.workbench.report.run_data import RunData
from moepp_megatron.workbench.report.savings import Savings
from moepp_megatron.workbench.report.summary import RunSummary

_HEAD = ("Quantity", "Vanilla layer", "This run", "Saved", "How it is computed")
_ALL_WORK, _ALL_BYTES = "All of the layer's work", "All-to-all bytes of the run"
Row = list[Cell]


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
    return [
        _row(
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
        _difference(_ALL_WORK, "sum of the three", vanilla.total, measured.total, formatting.flops),
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
