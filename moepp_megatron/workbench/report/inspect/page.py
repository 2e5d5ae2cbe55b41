"""Puts tables, plots and the packed tokens into the page's template."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from moepp_megatron.config import ConfigError
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.inspection.findings import Findings, find, to_json
from moepp_megatron.workbench.inspection.request import InspectRequest
from moepp_megatron.workbench.inspection.trace import Trace
from moepp_megatron.workbench.report import formatting
from moepp_megatron.workbench.report.blocks import Page, Section, Text, render_page
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.drawing import KIND_COLOURS, plot_style
from moepp_megatron.workbench.report.inspect.packed import packed
from moepp_megatron.workbench.report.inspect.plots import inspection_plots
from moepp_megatron.workbench.report.inspect.tables import group_table, token_table

# Tokens of a class below which the page's first sentence does not speak of it.
_FEWEST = 20

_ABOUT = (
    "FFN experts: a token and layer, mean and its standard error over the tokens. Selections: "
    "shares of the kinds of experts. Loss: mean in nats. A name picks these tokens in the text. "
    "The text is read in windows that follow each other, each without memory of the one before; "
    "the first token of a window is predicted by nothing and has no loss. Nothing is dropped: "
    "capacity limits are off."
)


def write_inspection(request: InspectRequest, traces: Sequence[Trace]) -> list[tuple[str, Path]]:
    """Write the page, and the JSON file if one is wanted; returns name and path of each.

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
    templates = resources.files("moepp_megatron.workbench.report") / "templates"
    script = (templates / "inspect.js").read_text()
    letters = [f"{letter}: " for letter in "AB"] if len(traces) > 1 else [""]
    page = Page(
        kind="MoE++ inspection",
        title=request.text.name,
        lead=_sentence(traces, findings),
        facts=[
            fact
            for letter, trace in zip(letters, traces, strict=True)
            for fact in (f"{letter}{trace.label}", *trace.facts)
        ],
        warnings=[f"{notice}." for notice in request.notices],
        cards=_cards(traces, findings),
        sections=[*_sections(findings), Section("By layer, place, frequency and loss", plots)],
        sources="the text and the checkpoint of each model",
        command="moepp inspect",
    )
    return render_page(
        page,
        "inspect.html.j2",
        expert_kinds=KIND_COLOURS.items(),
        is_code=request.language == "python",
        two=len(traces) > 1,
        data=packed(request, traces),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _sections(findings: Sequence[Findings]) -> list[Section]:
    first = findings[0]
    by_class = group_table("Kind of token", "class", [found.by_class for found in findings])
    sections = [Section("Which tokens take which experts", [by_class, Text([_ABOUT], "note")])]
    if first.by_tag:
        by_tag = group_table("Tag", "tag", [found.by_tag for found in findings])
        note = Text(["A token has the tag of the word that it belongs to."], "note")
        sections.append(Section("Parts of speech", [by_tag, note]))
    ends = [
        token_table(f"{end}{letter}", groups)
        for letter, found in zip((", A", ", B") if findings[1:] else ("",), findings, strict=True)
        for end, groups in (("Most", found.most_ffn), ("Fewest", found.fewest_ffn))
    ]
    text = f"Tokens that occur at least {first.least_count} times in the text. A dot is a space."
    title = "Tokens with the most and the fewest FFN experts"
    return [*sections, Section(title, [*ends, Text([text], "note")])]


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
