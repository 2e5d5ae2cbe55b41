"""Does a page of the built site load anything from another host? Readers may be offline.

`python -m benchmarks.site_check build/site` prints what it finds, and fails if it finds something.
Links that a reader follows are no loads.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# What a browser fetches by itself, and from which attribute.
_LOADS = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "link": ("href",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
# Of a page's relations to others only those that name files to fetch.
_FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
_OTHER_HOST = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
_OF_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    """Collects what a page loads from other hosts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at one element."""
        values = {name: value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.found += _OF_STYLES.findall(values.get("style", ""))
        if tag == "link" and not _FETCHED & set(values.get("rel", "").lower().split()):
            return
        for name in _LOADS.get(tag, ()):
            for address in values.get(name, "").split(","):
                if _OTHER_HOST.match(address):
                    self.found.append(address.strip())

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self._in_style = False

    def handle_data(self, data: str) -> None:
        """Look at a style sheet in the page."""
        if self._in_style:
            self.found += _OF_STYLES.findall(data)


def loads_elsewhere(text: str, suffix: str) -> list[str]:
    """Addresses of other hosts that a file makes a browser load.

    Args:
        text: The file.
        suffix: `.css` for a style sheet; else it is HTML or SVG.
    """
    if suffix == ".css":
        return _OF_STYLES.findall(text)
    page = _Page()
    page.feed(text)
    return page.found


def check(site: Path) -> Iterator[str]:
    """One line for each address that a file of the site loads from another host."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css", ".svg"):
            text = path.read_text(encoding="utf-8")
            for address in loads_elsewhere(text, path.suffix):
                yield f"{path.relative_to(site)} loads {address}"


def main() -> None:
    """Check the folder that the command line names."""
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    if not pages:
        sys.exit(f"{site} has no pages; build them first: ./launch/docs.sh")
    findings = list(check(site))
    print(*findings, f"{pages} pages, {len(findings)} loads from other hosts", sep="\n")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
