"""`profile.html`: findings, a timeline of each step, tables; needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moepp_megatron.version import __version__
from moepp_megatron.workbench.profiling.analysis import Profile
from moepp_megatron.workbench.profiling.compare import ProfileComparison, in_words
from moepp_megatron.workbench.report.cards import Card
from moepp_megatron.workbench.report.drawing import plot_style, svg_data_uri
from moepp_megatron.workbench.report.plot import Plot
from moepp_megatron.workbench.report.profile.findings import cards, findings
from moepp_megatron.workbench.report.profile.plots import profile_plots
from moepp_megatron.workbench.report.profile.rows import (
    COLLECTIVE_COLUMNS,
    LAYER_COLUMNS,
    RANK_COLUMNS,
    collective_rows,
    layer_rows,
    rank_rows,
)
from moepp_megatron.workbench.report.profile.timeline import timeline
from moepp_megatron.workbench.report.profile_comparison import comparison_figure
from moepp_megatron.workbench.report.template import render_template


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: Heading.
        note: How to read it.
        columns: Names.
        rows: Cells.
        words: Number of columns, from the left, that hold words.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int


@dataclass(frozen=True)
class ComparisonPart:
    """The differences from another profile: sentences and a plot."""

    name: str
    sentences: list[str]
    plot: Plot


@dataclass(frozen=True)
class _ProfilePage:
    """Everything that the template shows."""

    name: str
    facts: list[str]
    findings: list[str]
    cards: list[Card]
    plots: list[Plot]
    tables: list[TextTable]
    comparison: ComparisonPart | None
    timeline: str
    version: str


def render(
    profile: Profile, document: dict[str, Any], comparison: ProfileComparison | None = None
) -> str:
    """The page's HTML. The same profile gives the same page.

    Args:
        profile: The profile.
        document: The same profile in the form of `profiling.document`.
        comparison: The comparison with another profile.
    """
    data = json.dumps(timeline(profile), separators=(",", ":"))
    page = _ProfilePage(
        name=profile.name,
        facts=_facts(document),
        findings=findings(profile),
        cards=cards(profile),
        plots=profile_plots(profile, document),
        tables=_tables(document),
        # Inside of a script element nothing but its end tag is special.
        comparison=None if comparison is None else _comparison(comparison),
        timeline=data.replace("</", "<\\/"),
        version=__version__,
    )
    return render_template("profile.html.j2", page=page)


def _comparison(comparison: ProfileComparison) -> ComparisonPart:
    with plot_style():
        image = svg_data_uri(comparison_figure(comparison))
    caption = "A rank's step: bars are exposed time, the largest change on top."
    plot = Plot("What changed", caption, image, "Bars of changes by kind of communication", True)
    return ComparisonPart(comparison.before.name, in_words(comparison), plot)


def _facts(document: dict[str, Any]) -> list[str]:
    steps = document["steps"]
    facts = [
        f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}",
        f"{len(document['ranks'])} of {document['world_size']} ranks recorded",
        f"{document['backend'] or 'unknown backend'} on {document['device']}",
    ]
    nodes = len(set(document["nodes"]))
    if nodes:
        facts.append(f"{nodes} node" + ("s" if nodes > 1 else ""))
    layout = document["layout"]
    if layout:
        facts.append(", ".join(f"{key.upper()} {layout[key]}" for key in ("tp", "pp", "ep", "cp")))
        count = layout["num_microbatches"]
        facts.append(f"{count} micro-batch{'' if count == 1 else 'es'} a step")
    if document["dispatcher"]:
        facts.append(f"dispatcher {document['dispatcher']}")
    return facts


def _tables(document: dict[str, Any]) -> list[TextTable]:
    peak = {
        "rated": "Peak: the rated bandwidth of the link.",
        "measured": "Peak: what such a call reached alone.",
        "unknown": "Peak: unknown here; --ceiling gives one.",
    }[document["ceiling"]]
    found = [
        TextTable(
            "Collectives",
            "Mean of a step and rank, milliseconds. Waiting: until the last rank of the group had "
            "started. Bandwidth (GB/s, nccl-tests' formulas) is of the transfer, without waiting. "
            + peak,
            COLLECTIVE_COLUMNS,
            collective_rows(document),
            4,
        )
    ]
    if document["all_to_all"]:
        found.append(
            TextTable(
                "All-to-all of hidden vectors",
                "A step, over the recorded ranks. Formula: selections whose FFN expert lives on "
                "another rank, times the bytes of a vector (T K phi D b (EP - 1) / EP with the "
                "step's own counts), for the dispatcher that ran; '=' means equal to the byte. "
                "Side: gates and maps that travel along.",
                LAYER_COLUMNS,
                layer_rows(document),
                3,
            )
        )
    note = (
        "Milliseconds. What neither computes nor communicates is waiting for something else. "
        "Expert rows: what the rank's FFN experts computed in the forward passes, all layers."
    )
    found.append(TextTable("Ranks", note, RANK_COLUMNS, rank_rows(document), 0))
    return found
