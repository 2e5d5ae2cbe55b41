"""The page of `moepp inspect`: a text coloured by the FFN experts of its tokens, and tables."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from moepp_megatron.experts import KIND_NAMES
from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.tools.inspection.findings import Findings, TokenGroup, Trace, to_json
from moepp_megatron.tools.inspection.request import InspectRequest
from moepp_megatron.tools.inspection.text import TokenizedText
from moepp_megatron.tools.report import formatting
from moepp_megatron.tools.report.blocks import (
    Card,
    Cell,
    ColouredText,
    Page,
    PageSection,
    Table,
    Text,
    number,
    write_blocks,
)

# Tokens of a class below which the page's first sentence does not speak of it.
_FEWEST = 20
_COLUMNS = ("Tokens", "FFN experts", *(f"{kind} share" for kind in KIND_NAMES), "Loss")
_COLOURED = (
    "The bluer a token, the more FFN experts it takes, mean over the MoE layers. The pointer shows "
    "its experts and gates in each layer, and its loss."
)
_ABOUT = (
    "FFN experts: per token and layer, mean and its standard error over the tokens. Shares: of the "
    "selections, by kind of expert. Loss: mean in nats. The text is read in windows that follow "
    "each other, each without memory of the one before; the first token of a window is predicted "
    "by nothing and has no loss. Nothing is dropped: capacity limits are off."
)


def write_inspection(request: InspectRequest, trace: Trace) -> list[tuple[str, Path]]:
    """Write the page, and the JSON file if one is wanted; returns name and path of each.

    ReportError if the page cannot be written.
    """
    written = [("page", write_blocks(request.out, _page(request, trace)))]
    if request.json is not None:
        write_result(request.json, to_json(request, trace))
        written.append(("numbers", request.json))
    return written


def _page(request: InspectRequest, trace: Trace) -> Page:
    found = Findings.of(request, trace)
    note = f"Tokens that occur at least {found.least_count} times in the text. A dot is a space."
    ends = (("Most", found.most_ffn), ("Fewest", found.fewest_ffn))
    return Page(
        kind="MoE++ inspection",
        title=request.text.name,
        lead=_sentence(trace, found),
        facts=(trace.model.label, *trace.model.facts),
        warnings=[f"{notice}." for notice in request.notices],
        cards=_cards(request, trace, found),
        sections=[
            PageSection(
                "The text",
                [ColouredText([*_pieces(request.text, trace)]), Text([_COLOURED], "note")],
            ),
            PageSection(
                "Which tokens take which experts",
                [_table("Kind of token", found.by_class), Text([_ABOUT], "note")],
            ),
            PageSection(
                "Tokens with the most and the fewest FFN experts",
                [*(_table("Token", groups, title) for title, groups in ends), Text([note], "note")],
            ),
            PageSection("By layer", [_table("MoE layer", found.by_layer)]),
        ],
        sources="the text and the checkpoint",
        command="moepp inspect",
    )


def _pieces(text: TokenizedText, trace: Trace) -> Iterator[tuple[str, float, str]]:
    """The text in order: characters, FFN share, and the token's path; no path between tokens."""
    end, names = 0, trace.model.experts.names
    shares = trace.ffn.mean(axis=0) / trace.topk
    for token, (begin, after) in enumerate(text.spans.tolist()):
        if begin > end:
            yield text.text[end:begin], 0.0, ""
        end = after
        path = [f"{trace.topk * shares[token]:.2f} FFN experts, loss {_loss(trace.losses[token])}"]
        for row, layer in enumerate(trace.model.layers):
            ways = zip(trace.selected[row, token], trace.gates[row, token], strict=True)
            path.append(f"layer {layer}: " + ", ".join(f"{names[e]} {g:.3f}" for e, g in ways))
        if after > begin:
            yield text.text[begin:after], float(shares[token]), "\n".join(path)


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
    whole, balanced = found.whole, trace.topk * trace.model.balanced_share
    perplexity = formatting.number(math.exp(min(whole.loss, 700.0)), 1)
    return [
        Card("Tokens", f"{whole.count:,}", f"read in windows of {request.window:,}"),
        Card(
            "FFN experts per token",
            f"{whole.ffn:.2f}",
            f"of {trace.topk} a layer; perfect balance {balanced:.2f}",
            accent=True,
        ),
        Card("Loss", f"{whole.loss:.3f}", f"nats per token; perplexity {perplexity}"),
    ]


def _table(head: str, groups: Sequence[TokenGroup], title: str = "") -> Table:
    rows = []
    for group in groups:
        name = Cell(_visible(group.name), "code") if title else Cell(group.name)
        error = "" if math.isnan(group.ffn_error) else f" \u00b1 {group.ffn_error:.2f}"
        texts = [formatting.count(group.count), f"{group.ffn:.2f}{error}"]
        texts += [*map(formatting.percent, group.kinds), _loss(group.loss)]
        rows.append([name, *map(number, texts)])
    return Table((head, *_COLUMNS), rows, title=title)


def _loss(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _visible(piece: str) -> str:
    """A token's text with white space and control characters shown as in a Python string."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in piece)
    return shown.replace(" ", "\u00b7") if piece else "(part of a character)"
