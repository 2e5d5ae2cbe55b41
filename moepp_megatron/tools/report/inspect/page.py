"""Puts tables, the plot and the packed tokens into the page's template."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter

from moepp_megatron.config import ConfigError
from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.inspection.aggregates import TokenGroup
from moepp_megatron.tools.inspection.findings import Findings, find, to_json
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.tools.inspection.trace import Trace
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Card,
    Cell,
    Page,
    PageSection,
    Plot,
    Table,
    Text,
    number,
    render_page,
)
from moepp_megatron.tools.report.drawing import (
    KIND_COLOURS,
    MUTED,
    legend_above,
    new_figure,
    plot_style,
    svg_data_uri,
)
from moepp_megatron.tools.report.inspect.packed import packed

# Tokens of a class below which the page's first sentence does not speak of it.
_FEWEST = 20
_COLUMNS = ("Tokens", "FFN experts", "Selections", "Loss")
_ABOUT = (
    "FFN experts: a token and layer, mean and its standard error over the tokens. Selections: "
    "shares of the kinds of experts. Loss: mean in nats. A name picks these tokens in the text. "
    "The text is read in windows that follow each other, each without memory of the one before; "
    "the first token of a window is predicted by nothing and has no loss. Nothing is dropped: "
    "capacity limits are off."
)


def write_inspection(request: InspectRequest, trace: Trace) -> list[tuple[str, Path]]:
    """Write the page, and the JSON file if one is wanted; returns name and path of each.

    Raises:
        ConfigError: If a file cannot be written.
    """
    files = [("page", request.out, render(request, trace).encode("ascii", "xmlcharrefreplace"))]
    if request.json is not None:
        files.append(("numbers", request.json, to_json(request, trace)))
    for _, path, content in files:
        try:
            write_atomic(path, content)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); name another file"
            ) from error
    return [(name, path) for name, path, _ in files]


def render(request: InspectRequest, trace: Trace) -> str:
    """The page's HTML. It needs no other file and makes no network requests."""
    found = find(request, trace)
    with plot_style():
        plot = _kinds_by_layer(trace, found)
    templates = resources.files("moepp_megatron.tools.report") / "templates"
    script = (templates / "inspect.js").read_text()
    by_class = Table(
        ("Kind of token", *_COLUMNS),
        [[Cell(group.name, pick="class"), *_cells(group)] for group in found.by_class],
    )
    ends = [
        Table(
            ("Token", *_COLUMNS),
            [[Cell(_visible(group.name), "code"), *_cells(group)] for group in groups],
            title=title,
            wide=False,
        )
        for title, groups in (("Most", found.most_ffn), ("Fewest", found.fewest_ffn))
    ]
    note = f"Tokens that occur at least {found.least_count} times in the text. A dot is a space."
    page = Page(
        kind="MoE++ inspection",
        title=request.text.name,
        lead=_sentence(trace, found),
        facts=(trace.label, *trace.facts),
        warnings=[f"{notice}." for notice in request.notices],
        cards=_cards(request, trace, found),
        sections=[
            PageSection("Which tokens take which experts", [by_class, Text([_ABOUT], "note")]),
            PageSection(
                "Tokens with the most and the fewest FFN experts", [*ends, Text([note], "note")]
            ),
            PageSection("By layer", [plot]),
        ],
        sources="the text and the checkpoint",
        command="moepp inspect",
    )
    return render_page(
        page,
        "inspect.html.j2",
        expert_kinds=KIND_COLOURS.items(),
        is_code=request.language == "python",
        data=packed(request, trace),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )


def _sentence(trace: Trace, found: Findings) -> str:
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


def _cards(request: InspectRequest, trace: Trace, found: Findings) -> list[Card]:
    whole, balanced = found.whole, trace.topk * trace.balanced_share
    perplexity = formatting.number(math.exp(min(whole.loss, 700.0)), 1)
    return [
        Card("Tokens", f"{whole.count:,}", f"read in windows of {request.window:,}"),
        Card(
            "FFN experts per token",
            f"{whole.ffn:.2f}",
            f"of {trace.topk} a layer; perfect balance {balanced:.2f}",
            accent=True,
        ),
        Card(
            "Tokens without any FFN",
            formatting.percent(found.without_ffn),
            "zero-computation experts in every layer",
        ),
        Card(
            "Tokens with FFN only",
            formatting.percent(found.all_ffn),
            "FFN experts in every place of every layer",
        ),
        Card("Loss", f"{whole.loss:.3f}", f"nats per token; perplexity {perplexity}"),
    ]


def _visible(piece: str) -> str:
    """A token's text with white space and control characters shown as in a Python string."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return shown.replace(" ", "\u00b7") if piece else "(part of a character)"


def _cells(group: TokenGroup) -> Sequence[Cell]:
    error = "" if math.isnan(group.ffn_error) else f" \u00b1 {group.ffn_error:.2f}"
    texts = formatting.shares(group.kinds)
    bars = [
        (share, KIND_COLOURS[kind], f"{kind} {text}")
        for kind, share, text in zip(KIND_NAMES, group.kinds, texts, strict=True)
        if share > 0
    ]
    loss = "-" if math.isnan(group.loss) else f"{group.loss:.2f}"
    count = number(formatting.count(group.count))
    return count, number(f"{group.ffn:.2f}{error}"), Cell("", bars=bars), number(loss)


def _kinds_by_layer(trace: Trace, found: Findings) -> Plot:
    figure = new_figure(width=13.2)
    axes = figure.subplots()
    places = np.arange(len(found.by_layer))
    below = np.zeros(len(places))
    for index, kind in enumerate(KIND_NAMES):
        shares = np.asarray([layer.kinds[index] for layer in found.by_layer])
        if trace.experts.by_kind[index]:
            axes.bar(places, shares, 0.72, bottom=below, color=KIND_COLOURS[kind], label=kind)
        below += shares
    axes.axhline(trace.balanced_share, color="white", linewidth=2.4)
    axes.axhline(trace.balanced_share, color=MUTED, linewidth=1.2, linestyle="--")
    every = -(-len(places) // 48)
    axes.set_xticks(places[::every], [str(layer) for layer in trace.layers[::every]])
    axes.set_xlabel("MoE layer")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    legend_above(axes, ncols=4)
    values = [layer.ffn for layer in found.by_layer]
    return Plot(
        "Selections by layer",
        "Share of each kind of expert in the selections of a layer; dashed: FFN share under "
        "perfect balance.",
        svg_data_uri(figure),
        f"Stacked bars of {len(values)} MoE layers; FFN experts per token between "
        f"{min(values):.2f} and {max(values):.2f}.",
        wide=True,
    )
