"""The savings against a vanilla layer of the same size, and their table.

The vanilla layer has the same FFN experts and the same K, so that every one of the K*T selections
is an FFN expert's: it computes K experts per token, and every selection takes part in the
all-to-all.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moepp_megatron.experts import FFN, ExpertLayout
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import Cell, Table, number
from moepp_megatron.tools.report.run_data import RunConfig, RunData
from moepp_megatron.tools.report.summary import RunSummary

_HEAD = ("Quantity", "Vanilla layer", "This run", "Saved", "How it is computed")
Row = list[Cell]


@dataclass(frozen=True)
class _LayerFlops:
    """Forward work of all MoE layers for one token, FLOP: of FFN experts, and of everything."""

    ffn: float
    total: float


@dataclass(frozen=True)
class Savings:
    """A run against the vanilla layer of the same size."""

    measured: _LayerFlops  # with the FFN share of the tail (see `RunSummary`)
    vanilla: _LayerFlops
    vanilla_a2a_bytes: float | None  # what it would have sent; None if unknown


def vanilla_a2a_bytes(dispatcher: str, measured: float, ffn_fraction: float) -> float | None:
    """All-to-all bytes if every selection went to an FFN expert, in the same layout.

    `ffn_fraction` is their share of all selections. None where no selection was FFN-routed, so that
    there is nothing to scale up, or several selections of a token may travel as one vector.
    """
    if dispatcher == "allgather":
        # Every token goes everywhere, whatever its experts.
        return measured
    if dispatcher != "alltoall" or not ffn_fraction > 0:
        return None
    return measured / ffn_fraction


def compute_savings(config: RunConfig, summary: RunSummary) -> Savings:
    """Compares a run with the vanilla layer of the same size."""
    sent, fraction = summary.a2a_bytes, summary.ffn_fraction
    return Savings(
        measured=_flops(config, config.moe, summary.tail_ffn_fraction),
        vanilla=_flops(config, config.moe.vanilla, 1.0),
        vanilla_a2a_bytes=vanilla_a2a_bytes(config.moe.dispatcher, sent, fraction),
    )


def _flops(config: RunConfig, experts: ExpertLayout, ffn_fraction: float) -> _LayerFlops:
    layers, hidden = len(config.moe_layers), config.model.hidden_size
    taken = config.moe.router_topk * ffn_fraction
    ffn = layers * taken * FFN.flops(hidden, config.expert_ffn_hidden_size)
    router = sum(2 * experts.router_parameters(hidden, is_first=i == 0) for i in range(layers))
    return _LayerFlops(ffn, ffn + router + layers * experts.local_flops(hidden))


def savings_table(run: RunData, summary: RunSummary, savings: Savings) -> Table:
    """The comparison, for a layer that has zero-computation experts.

    Its columns: the quantity, that of the vanilla layer, of this run, the difference as a share of
    the vanilla value (in bytes for a total of the run), and how it is computed.
    """
    topk, fraction = run.config.moe.router_topk, summary.tail_ffn_fraction
    vanilla, measured = savings.vanilla, savings.measured
    ffn = "6 D H for each FFN expert taken: three matrices of a gated expert, 2 FLOP a weight"
    total = "with router, gating residual and zero-computation experts, as if all tokens took them"
    rows = [
        _difference(
            "FFN experts a token takes",
            "K; K x FFN share",
            *(topk, topk * fraction),
            lambda value: formatting.number(value, 2),
        ),
        _difference("FFN expert work", ffn, vanilla.ffn, measured.ffn, formatting.flops),
        _difference(
            "All of the layer's work", total, vanilla.total, measured.total, formatting.flops
        ),
        _traffic(run.config.moe.dispatcher, summary.a2a_bytes, savings.vanilla_a2a_bytes),
    ]
    caption = (
        f"The vanilla layer has the same {run.config.moe.num_ffn_experts} FFN experts and the "
        f"same K = {topk}, all of which are FFN experts. Work is that of one token, forward, in "
        f"all {len(run.config.moe_layers)} MoE layers, with the FFN share of {summary.window}, "
        f"{formatting.percent(fraction)}."
    )
    if summary.dropped_fraction > 0:
        caption += (
            f" A capacity limit dropped {formatting.percent(summary.dropped_fraction)} of the "
            "selections there; what that saved is not counted here, on either side."
        )
    return Table(_HEAD, rows, caption, strong=(2, 3))


def _traffic(dispatcher: str, measured: float, whole: float | None) -> Row:
    name, sent = "All-to-all bytes of the run", formatting.data_size(measured)
    if not measured:
        return _row(name, "no hidden vector left its rank in this run", "none", "none", "none")
    if whole is None:
        reason = f"vanilla's traffic does not follow from this run's (moe.dispatcher: {dispatcher})"
        return _row(name, reason, "not known", sent, "not known")
    rule = "the same" if dispatcher == "allgather" else "measured / FFN share of the whole run"
    how = f"forward, all ranks, MoE layers and steps; vanilla: {rule}, in the same layout"
    # Early steps are in it, so that its share of vanilla is another; bytes cannot be confused.
    saved = formatting.data_size(whole - measured)
    return _row(name, how, formatting.data_size(whole), sent, saved)


def _row(name: str, how: str, vanilla: str, measured: str, saved: str) -> Row:
    return [Cell(name), number(vanilla), number(measured), number(saved), Cell(how, "comment")]


def _difference(
    name: str, how: str, vanilla: float, measured: float, show: Callable[[float], str]
) -> Row:
    ratio = measured / vanilla
    saved = formatting.percent(1.0 - ratio)
    if ratio > 1.0:
        saved = f"{formatting.percent(ratio - 1.0)} more"
    return _row(name, how, show(vanilla), show(measured), saved)
