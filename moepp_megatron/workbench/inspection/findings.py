"""All aggregates of one model, computed once for the page and the JSON file."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.data.token_classes import CLASSES
from moepp_megatron.workbench.inspection.aggregates import (
    LayerSummary,
    TokenGroup,
    by_frequency,
    by_layer,
    by_position,
    extremes,
    groups,
    loss_correlation,
    whole,
)
from moepp_megatron.workbench.inspection.request import InspectRequest
from moepp_megatron.workbench.inspection.trace import Trace

# Tokens named at each end.
_EXTREMES = 12


@dataclass(frozen=True)
class Findings:
    """Aggregates of one model.

    Attributes:
        whole: All tokens.
        by_class: The classes that occur, in the order of `CLASSES`.
        by_tag: Parts of speech, the most frequent first; empty without a tagger.
        least_count: Least number of occurrences of a token in the two lists below.
        by_position: Groups by position in the window.
        by_frequency: Groups by the token's number of occurrences in the text.
        without_ffn: Share of the tokens that get no FFN expert in any layer.
        all_ffn: Share of the tokens whose every selection is an FFN expert.
        loss_correlation: Pearson's r of a token's loss and its FFN experts; NaN where undefined.
        next_loss_correlation: The same with the loss of the next token.
    """

    whole: TokenGroup
    by_class: list[TokenGroup]
    by_tag: list[TokenGroup]
    least_count: int
    most_ffn: list[TokenGroup]
    fewest_ffn: list[TokenGroup]
    by_position: list[TokenGroup]
    by_frequency: list[TokenGroup]
    by_layer: list[LayerSummary]
    without_ffn: float
    all_ffn: float
    loss_correlation: float
    next_loss_correlation: float


def find(request: InspectRequest, trace: Trace) -> Findings:
    """All aggregates of a trace of the request's text."""
    text = request.text
    classes = [CLASSES[index] for index in request.classes.tolist()]
    by_class = sorted(groups(trace, classes), key=lambda group: CLASSES.index(group.name))
    by_tag = [] if request.tags is None else groups(trace, request.tags)
    least, most, fewest = extremes(trace, text.ids, text.pieces, _EXTREMES)
    return Findings(
        whole(trace),
        by_class,
        sorted(by_tag, key=lambda group: -group.count),
        least,
        most,
        fewest,
        by_position(trace),
        by_frequency(trace, text.ids),
        by_layer(trace),
        float((trace.ffn == 0).all(axis=0).mean()),
        float((trace.ffn == trace.topk).all(axis=0).mean()),
        loss_correlation(trace),
        loss_correlation(trace, of_next=True),
    )
