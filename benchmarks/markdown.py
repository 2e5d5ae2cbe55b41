"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, with a line end behind each row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"|{''.join(map(_cell, row))}\n" for row in lines)


def _cell(text: str) -> str:
    return f" {text.replace('|', '\\|')} |" if text else " |"
