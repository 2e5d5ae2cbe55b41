"""Puts tables, plots and the packed tokens into the page's template."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moepp_megatron.config import ConfigError
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.version import __version__
from moepp_megatron.workbench.inspection.export import to_json
from moepp_megatron.workbench.inspection.findings import Findings, find
from moepp_megatron.workbench.inspection.request import InspectRequest
from moepp_megatron.workbench.inspection.trace import Trace
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.drawing import KIND_COLOURS, plot_style
from moepp_megatron.workbench.report.inspect.packed import packed
from moepp_megatron.workbench.report.inspect.plots import inspection_plots
from moepp_megatron.workbench.report.inspect.tables import InspectionRow, rows, token_rows
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.template import render_template

# Tokens of a class below which the page's first sentence does not speak of it.
_FEWEST = 20


@dataclass(frozen=True)
class Extremes:
    """The tokens with the most and the fewest FFN experts of one model."""

    label: str
    least_count: int
    most: list[InspectionRow]
    fewest: list[InspectionRow]


@dataclass(frozen=True)
class _InspectionPage:
    """Everything that the template shows."""

    title: str
    sentence: str
    models: list[tuple[str, tuple[str, ...]]]
    notices: list[str]
    cards: list[Card]
    kinds: list[tuple[str, str]]
    classes: list[InspectionRow]
    tags: list[InspectionRow]
    extremes: list[Extremes]
    plots: list[Plot]
    is_code: bool
    data: str
    script: str
    script_hash: str
    version: str


def write_inspection(request: InspectRequest, traces: Sequence[Trace]) -> list[tuple[str, Path]]:
    """Write the page, and the JSON file if one is wanted.

    Args:
        request: The request.
        traces: One per model.

    Returns:
        Name and path of every file.

    Raises:
        ConfigError: If a file cannot be written.
    """
    files = [("page", request.out, render(request, traces).encode("ascii", "xmlcharrefreplace"))]
    if request.json is not None:
        files.append(("numbers", request.json, to_json(request, traces)))
    for _, path, content in files:
        try:
            write_atomic(path, content)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); name another file"
            ) from error
    return [(name, path) for name, path, _ in files]


def render(request: InspectRequest, traces: Sequence[Trace]) -> str:
    """The page's HTML. It needs no other file and makes no network requests."""
    findings = [find(request, trace) for trace in traces]
    with plot_style():
        plots = inspection_plots(traces, findings)
    script = (
        resources.files("moepp_megatron.workbench.report") / "templates" / "inspect.js"
    ).read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = _InspectionPage(
        title=request.text.name,
        sentence=_sentence(traces, findings),
        models=[(trace.label, trace.facts) for trace in traces],
        notices=request.notices,
        cards=_cards(traces, findings),
        kinds=[(kind, KIND_COLOURS[kind]) for kind in KIND_NAMES],
        classes=rows([found.by_class for found in findings]),
        tags=rows([found.by_tag for found in findings]),
        extremes=[_extremes(*pair) for pair in zip(traces, findings, strict=True)],
        plots=plots,
        is_code=request.language == "python",
        data=packed(request, traces),
        script=script,
        script_hash=digest,
        version=__version__,
    )
    return render_template("inspect.html.j2", page=page)


def _extremes(trace: Trace, found: Findings) -> Extremes:
    return Extremes(
        trace.label, found.least_count, token_rows(found.most_ffn), token_rows(found.fewest_ffn)
    )


def _sentence(traces: Sequence[Trace], findings: Sequence[Findings]) -> str:
    if len(traces) == 1:
        return _findings_sentence(traces[0], findings[0])
    (a, b), (first, second) = (found.whole for found in findings), traces
    return (
        f"A: {_findings_sentence(first, findings[0])} B: {b.ffn:.2f} of {second.topk} "
        f"({b.ffn - a.ffn:+.2f}), loss {b.loss:.3f} nats ({b.loss - a.loss:+.3f})."
    )


def _findings_sentence(trace: Trace, found: Findings) -> str:
    whole = found.whole
    start = (
        f"{whole.count:,} tokens took {whole.ffn:.2f} of {trace.topk} FFN experts per layer on "
        f"average; {formatting.percent(1 - whole.ffn / trace.topk)} of the selections went to "
        "zero-computation experts."
    )
    known = [group for group in found.by_class if group.count >= _FEWEST]
    if len(known) < 2:
        return start
    most, fewest = (pick(known, key=lambda group: group.ffn) for pick in (max, min))
    return (
        f"{start} Of the kinds of tokens, \u201c{most.name}\u201d took the most ({most.ffn:.2f}) "
        f"and \u201c{fewest.name}\u201d the fewest ({fewest.ffn:.2f})."
    )


def _cards(traces: Sequence[Trace], findings: Sequence[Findings]) -> list[Card]:
    first = traces[0]
    wholes = [found.whole for found in findings]
    losses = [whole.loss for whole in wholes]
    return [
        Card("Tokens", f"{wholes[0].count:,}", f"read in windows of {first.window:,}"),
        Card(
            "FFN experts per token",
            _joined([f"{whole.ffn:.2f}" for whole in wholes]),
            f"of {first.topk} a layer; perfect balance "
            + _joined([f"{trace.topk * trace.balanced_share:.2f}" for trace in traces]),
            accent=True,
        ),
        Card(
            "Tokens without any FFN",
            _joined([formatting.percent(found.without_ffn) for found in findings]),
            "zero-computation experts in every layer",
        ),
        Card(
            "Tokens with FFN only",
            _joined([formatting.percent(found.all_ffn) for found in findings]),
            "FFN experts in every place of every layer",
        ),
        Card(
            "Loss",
            _joined([f"{loss:.3f}" for loss in losses]),
            "nats per token; perplexity "
            + _joined([formatting.number(math.exp(min(loss, 700.0)), 1) for loss in losses]),
        ),
        Card(
            "Loss and FFN experts",
            _joined([_correlation(found.loss_correlation) for found in findings]),
            "correlation over tokens; with the next token's loss "
            + _joined([_correlation(found.next_loss_correlation) for found in findings]),
        ),
    ]


def _correlation(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:+.2f}"


def _joined(values: Sequence[str]) -> str:
    return " / ".join(values)
