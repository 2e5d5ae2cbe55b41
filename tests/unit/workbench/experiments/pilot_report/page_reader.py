"""Reads a page of a pilot: its text, pictures and tables."""

from __future__ import annotations

from html.parser import HTMLParser


class Reader(HTMLParser):
    """A page's text, pictures and tables; checks that tags are balanced."""

    VOID = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.pictures: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.badges: list[tuple[str, list[str]]] = []
        self.feed(page)
        assert not self.open, f"tags left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.tags.add(tag)
        self.addresses += [values[k] for k in ("src", "href", "action") if k in values]
        if tag == "img":
            self.pictures.append((values["src"], values["alt"]))
        if tag in self.VOID:
            return
        self.open.append((tag, values))
        table = self._inside("table")
        if table is not None:
            rows = self.tables.setdefault(table["id"], [])
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append("")
        if "badge" in values.get("class", "").split():
            self.badges.append((values["class"].split()[1], []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._inside("style") is not None:
            return
        self.words.append(data)
        table = self._inside("table")
        if table is not None and any(tag in ("td", "th") for tag, _ in self.open):
            row = self.tables[table["id"]][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())
        if data.strip() and any("badge" in v.get("class", "").split() for _, v in self.open):
            self.badges[-1][1].append(data.strip())

    def _inside(self, tag: str) -> dict[str, str] | None:
        return next((values for name, values in self.open if name == tag), None)

    def cell(self, table: str, row: str, column: str, nth: int = 0) -> str:
        """By the headings of row and column; `nth` of columns with the same heading."""
        heads, *rows = self.tables[table]
        index = [i for i, head in enumerate(heads) if head == column][nth]
        return next(cells[index] for cells in rows if cells[0].startswith(row))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())
