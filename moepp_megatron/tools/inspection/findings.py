"""All aggregates for the page, and all results as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from moepp_megatron.data.token_classes import CLASSES
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.tools.inspection.aggregates import (
    LayerSummary,
    TokenGroup,
    all_tokens,
    by_layer,
    extremes,
    groups,
)
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.tools.inspection.trace import Trace

# Tokens named at each end.
_EXTREMES = 12
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Findings:
    """Aggregates of a trace.

    Attributes:
        whole: All tokens.
        by_class: The classes that occur, in the order of `CLASSES`.
        least_count: Least number of occurrences of a token in the two lists below.
        without_ffn: Share of the tokens that get no FFN expert in any layer.
        all_ffn: Share of the tokens whose every selection is an FFN expert.
    """

    whole: TokenGroup
    by_class: list[TokenGroup]
    least_count: int
    most_ffn: list[TokenGroup]
    fewest_ffn: list[TokenGroup]
    by_layer: list[LayerSummary]
    without_ffn: float
    all_ffn: float


def find(request: InspectRequest, trace: Trace) -> Findings:
    """All aggregates of a trace of the request's text."""
    text = request.text
    classes = [CLASSES[index] for index in request.classes.tolist()]
    by_class = sorted(groups(trace, classes), key=lambda group: CLASSES.index(group.name))
    least, most, fewest = extremes(trace, text.ids, text.pieces, _EXTREMES)
    return Findings(
        all_tokens(trace),
        by_class,
        least,
        most,
        fewest,
        by_layer(trace),
        float((trace.ffn == 0).all(axis=0).mean()),
        float((trace.ffn == trace.topk).all(axis=0).mean()),
    )


def to_json(request: InspectRequest, trace: Trace) -> bytes:
    """The JSON file: the text's tokens, the model's aggregates and every selection."""
    text = request.text
    content = {
        "format_version": _FORMAT_VERSION,
        "text": text.name,
        "language": request.language,
        "window": request.window,
        "expert_kinds": list(KIND_NAMES),
        "notices": request.notices,
        "tokens": {
            "id": text.ids.tolist(),
            "span": text.spans.tolist(),
            "text": text.pieces,
            "class": [CLASSES[index] for index in request.classes.tolist()],
        },
        # A list, as readers of this version know it.
        "models": [_model(request, trace)],
    }
    return (json.dumps(_finite(content), allow_nan=False) + "\n").encode()


def _model(request: InspectRequest, trace: Trace) -> dict[str, Any]:
    return {
        "label": trace.label,
        "experts": asdict(trace.experts),
        "layers": list(trace.layers),
        "router_topk": trace.topk,
        "balanced_ffn_share": trace.balanced_share,
        **asdict(find(request, trace)),
        # [layer][token][k], the largest gate first.
        "selected": trace.selected.tolist(),
        "gates": [[[round(g, 6) for g in k] for k in layer] for layer in trace.gates.tolist()],
        # [token]; null for the first token of a window, which nothing predicts.
        "loss": [round(loss, 6) for loss in trace.losses.tolist()],
    }


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by null, since JSON has no such numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
