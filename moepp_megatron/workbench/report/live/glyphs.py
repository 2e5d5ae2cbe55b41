"""The characters of a view: block and braille characters, or ASCII if no others are possible."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

# Style of each kind of expert, in the order of KIND_NAMES.
KIND_STYLES = ("blue", "magenta", "yellow", "bright_black")


@dataclass(frozen=True)
class Glyphs:
    """The characters of a view.

    Attributes:
        bars: Fill of a bar for each kind of expert, so that kinds differ without colour too.
        levels: Heights of a sparkline, lowest first.
        braille: Whether curves have two by four dots a cell.
        point: One measured point of a curve.
        line: A horizontal line.
        mark: Where a bar should end.
    """

    bars: tuple[str, str, str, str]
    levels: str
    braille: bool
    point: str
    line: str
    mark: str


UNICODE = Glyphs(
    bars=("\u2588", "\u2593", "\u2592", "\u2591"),
    levels="\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588",
    braille=True,
    point="\u25c6",
    line="\u2500",
    mark="\u2503",
)
ASCII = Glyphs(bars=("#", "c", "=", "."), levels="_.-~=+*#", braille=False, point="o", line="-",
               mark="|")  # fmt: skip


def glyphs_of(console: Console) -> Glyphs:
    """The characters that `console` can show."""
    return ASCII if console.options.ascii_only else UNICODE
