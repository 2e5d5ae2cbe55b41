"""Writes all results of an inspection as plain JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moepp_megatron.data.token_classes import CLASSES
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.workbench.inspection.findings import find
from moepp_megatron.workbench.inspection.request import InspectRequest
from moepp_megatron.workbench.inspection.trace import Trace

_FORMAT_VERSION = 1


def to_json(request: InspectRequest, traces: Sequence[Trace]) -> bytes:
    """The JSON file: the text's tokens, and for each model its aggregates and every selection."""
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
            "tag": request.tags,
        },
        "models": [_model(request, trace) for trace in traces],
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
