"""`profile.html`: findings, costs, tables; needs no other file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moepp_megatron.tools.profiling.analysis import Profile
from moepp_megatron.tools.report.blocks import Cell, Page, PageSection, Table, render_page
from moepp_megatron.tools.report.profile.findings import cards, findings
from moepp_megatron.tools.report.profile.plots import profile_plots
from moepp_megatron.tools.report.profile.tables import TextTable, profile_tables


def render(profile: Profile, document: dict[str, Any]) -> str:
    """The page's HTML. The same profile gives the same page.

    Args:
        profile: The profile.
        document: The same profile in the form of `profiling.document`.
    """
    page = Page(
        kind="Communication profile",
        title=profile.name,
        lead="\n".join(findings(profile)),
        facts=list(_facts(document)),
        cards=cards(profile),
        sections=[
            PageSection("Costs", profile_plots(profile, document)),
            *map(_section, profile_tables(document)),
        ],
        sources="the run's traces",
        command="moepp profile RUN",
    )
    return render_page(page, "profile.html.j2")


def _section(table: TextTable) -> PageSection:
    rows = [
        [Cell(text, "text" if i < table.words else "number") for i, text in enumerate(row)]
        for row in table.rows
    ]
    caption = f"{table.unit[0].upper()}{table.unit[1:]}. {table.note}"
    return PageSection(table.title, [Table(table.columns, rows, caption)])


def _facts(document: dict[str, Any]) -> Iterator[str]:
    steps, layout = document["steps"], document["layout"]
    yield f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    yield f"{len(document['ranks'])} of {document['world_size']} ranks recorded"
    yield f"{document['backend'] or 'unknown backend'} on {document['device']}"
    if nodes := len(set(document["nodes"])):
        yield f"{nodes} node{'s' if nodes > 1 else ''}"
    if layout:
        yield ", ".join(f"{key.upper()} {layout.get(key, 1)}" for key in ("tp", "pp", "ep", "cp"))
        count = layout.get("num_microbatches", 1)
        yield f"{count} micro-batch{'' if count == 1 else 'es'} a step"
    if document["dispatcher"]:
        yield f"dispatcher {document['dispatcher']}"
