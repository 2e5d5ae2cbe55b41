"""`docs/settings.md`: every setting with default, unit, range and meaning, from the schema alone.

Write it anew: `python -m benchmarks.settings`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moepp_megatron.config.reference import SectionReference, section_references

FILE = Path(__file__).parents[1] / "docs" / "settings.md"
_HEAD = """\
# Settings

Written by `python -m benchmarks.settings` from `moepp_megatron/config/schema`; do not edit.
Set any of them in a YAML file or on the command line (`moe.tau=0.5`). The unit `1` is a pure
number, and `-` is no quantity. What must hold between settings is checked at the start
(`moepp train CONFIG --dry-run`). `moepp config keys [PREFIX]` prints the same in a terminal, and
`moepp config show CONFIG` what a configuration sets and where.
"""


def page() -> str:
    """The page."""
    return "\n".join([_HEAD, *(part for each in section_references() for part in _section(each))])


def _section(section: SectionReference) -> Iterator[str]:
    yield f"## {section.name}\n"
    yield f"{section.meaning}\n"
    if not section.settings:
        return
    yield "| setting | default | unit | range | what it is |\n|---|---|---|---|---|"
    rows = []
    for each in section.settings:
        default = "must be given" if each.default is None else f"`{each.default}`"
        cells = (f"`{each.key}`", default, each.unit, ", ".join(each.allowed), each.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    yield "\n".join(rows) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
