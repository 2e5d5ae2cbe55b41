"""The tables of metrics in the docs, made from the catalogue.

``python -m benchmarks.metrics_page`` writes them anew, between their markers, and the healthy
ranges into the rows of docs/routing.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from moepp_megatron.catalogue import IN_LAYERS, METRICS, OF_RECORD, Metric
from moepp_megatron.config.guard_metrics import COMPARED, COUNTED, GUARD_METRICS, MEASURED
from moepp_megatron.observe.tensorboard import tag_of
from moepp_megatron.workbench.report.live import exported

DOCS = Path(__file__).parents[1] / "docs"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"|{''.join(map(_cell, row))}\n" for row in lines)


def _cell(text: str) -> str:
    return f" {text.replace('|', '\\|')} |" if text else " |"


def _code(name: str) -> str:
    return f"`{name}`" if name else ""


def of_records() -> str:
    """Every number of the newest record."""
    head = ("key in `metrics.jsonl`", "meaning", "unit", "TensorBoard", "Prometheus", "labels")
    rows = [
        (_code(key), row.meaning, row.unit, _tag(key, row), *_served(row.prometheus, row.labels))
        for key, row in OF_RECORD.items()
    ]
    idlest, other = IN_LAYERS["min_ffn_load"], exported.OTHER
    rows.append(("", idlest.meaning, "", "", *_served(idlest.prometheus, idlest.labels)))
    rows.append(("", other.meaning, "", "", *_served(other.name, other.labels)))
    return table(head, rows)


def in_layers() -> str:
    """Router health by its name."""
    rows = [
        (_code(name), IN_LAYERS[name].unit, IN_LAYERS[name].meaning)
        for name in MEASURED
        # The guard works it out by itself.
        if name != "gate_entropy_ratio"
    ]
    return table(("of `router_health`", "unit", "meaning"), rows)


def of_run() -> str:
    """What is served of the run itself."""
    rows = [(*_served(each.name, each.labels), each.meaning) for each in exported.OF_RUN]
    return table(("of the run", "labels", "meaning"), rows)


def of_guard() -> str:
    """What rules may look at."""
    rows = [(_code(name), _place(name), METRICS[name].with_unit) for name in GUARD_METRICS]
    return table(("metric", "of", "meaning"), rows)


def _place(name: str) -> str:
    if name in {**COUNTED, **COMPARED}:
        return "each layer"
    return "each layer, where measured" if name in MEASURED else "the model"


def _served(name: str, labels: str) -> tuple[str, str]:
    return _code(name), labels.replace(",", ", ")


def _tag(key: str, row: Metric) -> str:
    if key == "step":
        return ""
    return _code(f"{row.group}/..." if row.labels else tag_of(key))


TABLES = {
    ("metrics.md", "records"): of_records,
    ("metrics.md", "router health"): in_layers,
    ("metrics.md", "run"): of_run,
    ("guard.md", "guard"): of_guard,
}


def with_tables(page: str, text: str) -> str:
    """The text of a page with its tables as the catalogue has them now."""
    for (of, name), make in TABLES.items():
        if of != page:
            continue
        begin, end = f"<!-- begin: {name}, python -m benchmarks.metrics_page -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + end, re.DOTALL)
        assert len(pattern.findall(text)) == 1, f"docs/{page} has no place for the table {name}"
        before, after = pattern.split(text)
        text = before + begin + make() + end + after
    return text


def with_ranges(text: str) -> str:
    """The text of routing.md with the catalogue's healthy ranges, in the third cell of each row."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        cells = line.split(" | ")
        name = re.match(r"\| `(\w+)`", line)
        row = METRICS.get(name[1]) if name else None
        if row is not None and row.healthy:
            lines[number] = " | ".join([*cells[:2], row.healthy, *cells[3:]])
    return "\n".join(lines)


def main() -> None:
    """Write the pages."""
    routing = DOCS / "routing.md"
    routing.write_text(with_ranges(routing.read_text(encoding="utf-8")), encoding="utf-8")
    for page in dict.fromkeys(page for page, _ in TABLES):
        path = DOCS / page
        path.write_text(with_tables(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
