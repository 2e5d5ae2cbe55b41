"""A page as a list of blocks, which `templates/page.html.j2` draws."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.tools.report.run_data import ReportError
from moepp_megatron.version import __version__


@dataclass(frozen=True)
class Card:
    """One headline number."""

    label: str
    value: str
    note: str
    accent: bool = False


@dataclass(frozen=True)
class Plot:
    """A titled picture with its text.

    Attributes:
        caption: What the plot shows and how it is computed.
        image: ``data:`` address of the picture; None if there is nothing to draw.
        alt: The picture in words; without a picture, why there is none.
    """

    title: str
    caption: str
    image: str | None
    alt: str
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        look: How it is set: as text, a number (on the right), a comment, code, or a badge.
    """

    text: str
    look: Literal["text", "number", "comment", "code", "critical", "warning", "info"] = "text"


def number(text: str) -> Cell:
    """The cell of a number."""
    return Cell(text, "number")


@dataclass(frozen=True)
class Table:
    """A table; a heading stands as its column's cells of the first row do.

    Attributes:
        rows: Cells by row, as many as headings; the first one names its row.
        strong: Indices of rows to emphasise.
        wide: Whether it takes the whole width of the page.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    strong: Sequence[int] = ()
    title: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Text:
    """Paragraphs.

    Attributes:
        lines: One paragraph each.
        look: `note` is small, `warning` framed, `nothing` stands where something could be; `code`
            keeps its line breaks.
        fold: With a title, all of it is folded away below that.
    """

    lines: Sequence[str]
    look: Literal["text", "note", "warning", "nothing", "code"] = "text"
    fold: str = ""


@dataclass(frozen=True)
class ColouredText:
    """A text whose pieces have a background.

    Attributes:
        pieces: Characters, strength of the colour from 0 to 1, and text for the pointer.
    """

    pieces: Sequence[tuple[str, float, str]]


Block = Plot | Table | Text | ColouredText


@dataclass(frozen=True)
class PageSection:
    """Blocks below a heading.

    Attributes:
        blocks: Plots in two columns, unless they are wide; all else in the full width.
    """

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        kind: What it is: "MoE++ pilot".
        lead: The result in a sentence, or a line for each.
        warnings: What a reader has to know before believing the numbers.
        sources: The files that it is made of.
        command: What makes it again.
    """

    kind: str
    title: str
    sources: str
    command: str
    lead: str = ""
    facts: Sequence[str] = ()
    warnings: Sequence[str] = ()
    cards: Sequence[Card] = ()
    sections: Sequence[PageSection] = ()


def _render_page(page: Page) -> str:
    """The page's HTML, which needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("moepp_megatron.tools.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["slug"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    kinds = {Plot: "plot", Table: "table", Text: "text", ColouredText: "coloured"}
    template = environment.get_template("page.html.j2")
    return template.render(page=page, version=__version__, block_kinds=kinds)


def write_blocks(path: Path, page: Page) -> Path:
    """Write the page as ASCII, whole or not at all; folders that are missing are made.

    The same content gives the same bytes.

    Returns:
        `path`.

    Raises:
        ReportError: It cannot be written.
    """
    try:
        write_result(path, _render_page(page).encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be written ({error.strerror}); make room, or the folder writable"
        ) from error
    return path
