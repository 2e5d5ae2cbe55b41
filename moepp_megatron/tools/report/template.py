"""Renders the templates of all pages."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from moepp_megatron.runtime.atomic import write_result
from moepp_megatron.tools.report.run_data import ReportError

# A page with fewer sections is seen as a whole.
_FEWEST_HEADINGS = 3


def render_template(name: str, **values: Any) -> str:
    """The HTML of a template in `templates/`; every value that it names must be given."""
    environment = Environment(
        loader=PackageLoader("moepp_megatron.tools.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return _with_contents(environment.get_template(name).render(**values))


def write_page(path: Path, html: str) -> None:
    """Write a page as ASCII, whole or not at all; folders that are missing are made.

    Raises:
        ReportError: It cannot be written.
    """
    try:
        write_result(path, html.encode("ascii", "xmlcharrefreplace"))
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be written ({error.strerror}); make room, or the folder writable"
        ) from error


def _with_contents(html: str) -> str:
    """Add a table of contents below the page's header: a link to each second-level heading."""
    links: list[str] = []

    def heading(match: re.Match[str]) -> str:
        title = match[1]
        name = re.sub(r"[^a-z0-9]+", "-", unescape(title).lower()).strip("-")
        links.append(f'<li><a href="#{name}">{title}</a></li>')
        return f'<h2 id="{name}">{title}</h2>'

    linked = re.sub(r"<h2>([^<]*)</h2>", heading, html)
    if len(links) < _FEWEST_HEADINGS:
        return html
    contents = f'<nav aria-label="Contents"><ul class="contents">{"".join(links)}</ul></nav>'
    return linked.replace("</header>\n", f"</header>\n{contents}\n", 1)
