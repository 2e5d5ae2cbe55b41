"""The data of the page's script: tokens, selections, gates and losses as one JSON object.

Numbers of tokens are little-endian arrays in base64: a tenth of JSON's size.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from typing import Any

import numpy as np

from moepp_megatron.data.token_classes import CLASSES
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.tools.inspection.text import TokenizedText
from moepp_megatron.tools.inspection.trace import Trace
from moepp_megatron.tools.report.drawing import KIND_COLOURS

_GATE_STEPS = 65_535


def packed(request: InspectRequest, trace: Trace) -> str:
    """The JSON object as ASCII that a script element can hold."""
    counts = Counter(request.text.ids.tolist())
    content = {
        "pieces": request.text.pieces,
        "gaps": _gaps(request.text),
        "ids": _base64(request.text.ids, "<u4"),
        "counts": _base64([counts[token] for token in request.text.ids.tolist()], "<u4"),
        "classes": _base64(request.classes, "<u2"),
        "classNames": list(CLASSES),
        "window": request.window,
        "kinds": list(KIND_NAMES),
        "colours": [KIND_COLOURS[kind] for kind in KIND_NAMES],
        **_routing(trace),
    }
    # A text may hold "</script>".
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _routing(trace: Trace) -> dict[str, Any]:
    largest = float(trace.gates.max()) or 1.0
    known = trace.losses[np.isfinite(trace.losses)]
    return {
        "layers": list(trace.layers),
        "topk": trace.topk,
        "names": trace.experts.names,
        "kindOf": [KIND_NAMES.index(kind) for kind in trace.experts.kinds],
        "selected": _base64(trace.selected, "<u2"),
        "gates": _base64(np.rint(trace.gates / largest * _GATE_STEPS), "<u2"),
        "largestGate": largest,
        "losses": _base64(trace.losses, "<f4"),
        # The end of the loss's colours: a few tokens are far worse than all others.
        "highLoss": float(np.quantile(known, 0.98)) if len(known) else 1.0,
    }


def _gaps(text: TokenizedText) -> dict[str, str]:
    """Characters that belong to no token, by the token after them."""
    ends = np.concatenate([[0], text.spans[:-1, 1]])
    return {
        str(index): text.text[end:begin]
        for index, (end, begin) in enumerate(zip(ends, text.spans[:, 0], strict=True))
        if begin > end
    }


def _base64(values: Any, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode("ascii")
