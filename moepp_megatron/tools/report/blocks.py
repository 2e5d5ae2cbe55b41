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
    """A titled picture with its text."""

    title: str
    caption: str  # what the plot shows and how it is computed
    image: str | None  # ``data:`` address; None if there is nothing to draw
    alt: str  # the picture in words; without a picture, why there is none
    wide: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of a table, set as text, a number (on the right), a comment, code or a badge."""

    text: str
    look: Literal["text", "number", "comment", "code", "critical", "warning", "info"] = "text"


def number(text: str) -> Cell:
    """The cell of a number."""
    return Cell(text, "number")


@dataclass(frozen=True)
class Table:
    """A table; a heading stands as its column's cells of the first row do."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]  # as many cells as headings; the first one names its row
    caption: str = ""
    strong: Sequence[int] = ()  # indices of rows to emphasise
    title: str = ""
    wide: bool = True  # takes the whole width of the page


@dataclass(frozen=True)
class Text:
    """Paragraphs, one for each of `lines`.

    `note` is small, `warning` framed, `nothing` stands where something could be; `code` keeps its
    line breaks. With a title in `fold`, all of it is folded away below that.
    """

    lines: Sequence[str]
    look: Literal["text", "note", "warning", "nothing", "code"] = "text"
    fold: str = ""


@dataclass(frozen=True)
class ColouredText:
    """Pieces of text: characters, strength of the background from 0 to 1, text for the pointer."""

    pieces: Sequence[tuple[str, float, str]]


Block = Plot | Table | Text | ColouredText


@dataclass(frozen=True)
class PageSection:
    """Blocks below a heading: plots in two columns, unless wide; all else in the full width."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page."""

    kind: str  # such as "MoE++ pilot"
    title: str
    sources: str  # the files that it is made of
    command: str  # what makes it again
    lead: str = ""  # the result in a sentence, or a line for each
    facts: Sequence[str] = ()
    warnings: Sequence[str] = ()  # to know before believing the numbers
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
    """Write the page as ASCII, whole or not at all, make missing folders, and return `path`.

    The same content gives the same bytes. ReportError if it cannot be written.
    """
    try:
        write_result(path, _render_page(page).encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be written ({error.strerror}); make room, or the folder writable"
        ) from error
    return path
