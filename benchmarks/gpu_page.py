"""One page of what `benchmarks/gpu.sh` measured of a GPU, each number with what was expected.

    python -m benchmarks.gpu_page RESULTS.json

The page is RESULTS.html.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.tools.report.blocks import Cell, Page, PageSection, Table, write_blocks

_GIB = 2**30
_ENDS = {0: "passed", 3: "not possible here", 124: "cut off at its limit"}


def write_gpu_page(results: Path, page: Path) -> None:
    """Write the page of a results file; it needs no other file and no network.

    Raises:
        ConfigError: If `results` cannot be read or is not what `benchmarks/gpu.sh` writes.
    """
    try:
        record = read_json(results)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{results} must be a results file of benchmarks/gpu.sh, and cannot be read ({error})"
        ) from None
    needed = ("card", "steps", "measured", "layer", "step")
    if not isinstance(record, dict) or any(name not in record for name in needed):
        raise ConfigError(
            f"{results} must be a results file of benchmarks/gpu.sh, with {', '.join(needed)}; "
            "run the script, which names its file at the end"
        )
    versions = ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())
    commits = ", ".join(str(commit)[:12] for commit in record.get("commits", ()))
    facts = [f"driver {record.get('driver') or 'none'}", versions, f"commit {commits}"]
    content = Page(
        kind="MoE++ on one GPU",
        title=record["card"],
        facts=facts,
        sections=[section for section in _sections(record) if section is not None],
        sources="the results of benchmarks/gpu.sh",
        command="python -m benchmarks.gpu_page",
    )
    write_blocks(page, content)


def _table(
    title: str, columns: Sequence[str], words: int, rows: Sequence[Sequence[str]], note: str
) -> PageSection | None:
    """A table whose first `words` columns hold words, the others numbers; None without rows."""
    if not rows:
        return None
    cells = [
        [Cell(text, "text" if place < words else "number") for place, text in enumerate(row)]
        for row in rows
    ]
    return PageSection(title, [Table(columns, cells, note)])


def _sections(found: Mapping[str, Any]) -> Iterator[PageSection | None]:
    yield _table(
        "Parts",
        ("part", "end", "seconds"),
        2,
        [
            (
                step["name"],
                _ENDS.get(step["exit_status"], f"failed ({step['exit_status']})"),
                str(step["seconds"]),
            )
            for step in found["steps"]
        ],
        "The last run of each.",
    )
    yield _table(
        "Tests",
        ("part", "what", "count"),
        2,
        [
            (part, what, str(count))
            for part, counts in found.get("tests", {}).items()
            for what, count in counts.items()
        ],
        "tests/gpu on this GPU.",
    )
    yield _card(found["measured"])
    layers = [(name, row) for name, rows in found["layer"].items() for row in rows]
    yield _efficiency(layers)
    yield _bounds(layers)
    yield _steps(found["step"])
    yield _serve(found.get("serve", {}))
    yield _runs(found.get("runs", {}))


def _card(card: Mapping[str, Any]) -> PageSection | None:
    rated = card.get("rated_tflops") or {}
    pairs = [
        (f"{dtype} product, TFLOP/s", value, rated.get(dtype))
        for dtype, value in card.get("matmul_tflops", {}).items()
    ]
    if "copy_gb_s" in card:
        pairs.append(("copy in memory, GB/s", card["copy_gb_s"], card.get("rated_gb_s")))
    rows = [(name, _short(value), *_beside(value, expected)) for name, value, expected in pairs]
    return _table(
        "The GPU itself",
        ("rate", "measured", "rated", "share"),
        1,
        rows,
        "Rated by configs/hardware; the bounds below are made of the measured rates.",
    )


def _efficiency(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> PageSection | None:
    rows = [
        (
            name,
            row["shape"],
            row["pass"].replace("_", " + "),
            f"{row['tau']:g}",
            f"{row['vanilla_ms']:.2f}",
            f"{row['moepp_ms']:.2f}",
            f"{row['speedup']:.2f}",
            f"{1 / row['phi']:.2f}",
            f"{row['efficiency']:.3f}",
            _number(row["paper_efficiency"]),
        )
        for name, row in layers
    ]
    return _table(
        "A layer against the vanilla layer",
        (
            "setting",
            "shape",
            "pass",
            "tau",
            "vanilla, ms",
            "MoE++, ms",
            "speedup",
            "at most",
            "efficiency",
            "paper's",
        ),
        3,
        rows,
        "efficiency = speedup x phi, 1 if nothing but FFN experts took time; at most: 1 / phi. The "
        "paper's is of experts' forward times.",
    )


def _bounds(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> PageSection | None:
    rows = []
    for name, row in layers:
        if row["pass"] != "forward":
            continue
        bounds = row["moepp_bounds_ms"]
        rows += [
            (
                name,
                row["shape"],
                f"{row['tau']:g}",
                part.replace("_", " "),
                f"{ms:.3f}",
                f"{bounds[part]:.3f}",
                f"{ms / bounds[part]:.1f}",
            )
            for part, ms in row["moepp_parts_ms"].items()
            if bounds.get(part)
        ]
    return _table(
        "Parts of the MoE++ layer and their bounds",
        ("setting", "shape", "tau", "part", "measured, ms", "bound, ms", "times the bound"),
        4,
        rows,
        "Forward. Bound: bytes over the measured copy, or FLOPs over the measured product.",
    )


def _serve(rows: Mapping[str, Mapping[str, Any]]) -> PageSection | None:
    phases = ("prefill", "decode")
    return _table(
        "Serving in transformers",
        (
            "model",
            *(f"{phase}, {what}" for phase in phases for what in ("tokens/s", "of Mixtral's")),
        ),
        1,
        [
            (name, *(cell for phase in phases for cell in _rates(row, phase)))
            for name, row in rows.items()
        ],
        "Decoding is compiled. FFN share: of the picks.",
    )


def _rates(row: Mapping[str, Any], phase: str) -> tuple[str, str]:
    return f"{row[f'{phase}_tokens_per_s']:,.0f}", f"{row[f'{phase}_of_vanilla']:.2f}"


def _steps(steps: Mapping[str, Mapping[str, Any]]) -> PageSection | None:
    rows = [
        (
            name,
            f"{row['vanilla_ms']:.1f}",
            f"{row['moepp_ms']:.1f}",
            f"{row['speedup']:.2f}",
            f"{1 / row['phi']:.2f}",
            f"{row['tokens'] / row['moepp_ms'] * 1e3:,.0f}",
            *(_number(row[f"{model}_j"]) for model in ("vanilla", "moepp")),
            _number(row.get("static_rows_ms")),
        )
        for name, row in steps.items()
    ]
    return _table(
        "A training step against the vanilla model's",
        (
            "setting",
            "vanilla, ms",
            "MoE++, ms",
            "speedup",
            "at most",
            "tokens/s",
            "vanilla, J",
            "MoE++, J",
            "static rows, ms",
        ),
        1,
        rows,
        "at most: 1 / phi, if nothing but FFN experts took time.",
    )


def _runs(runs: Mapping[str, Mapping[str, Any]]) -> PageSection | None:
    rows = [
        (
            name,
            (row.get("modules") or "").partition(";")[0].rpartition(": ")[2],
            str(row["step"]),
            _number(row["loss"]),
            f"{row['step_time_s'] * 1e3:,.1f}",
            *_memory(row["memory_bytes"], row["estimated_bytes"]),
        )
        for name, row in runs.items()
    ]
    return _table(
        "Training",
        ("run", "packages", "step", "loss", "ms per step", "memory, GiB", "estimate, GiB", "share"),
        2,
        rows,
        "The last step. Memory in use on the fullest GPU; the planner's estimate, CUDA's included.",
    )


def _memory(used: float | None, estimate: float | None) -> tuple[str, str, str]:
    if used is None:
        return "", _number(None if estimate is None else estimate / _GIB), ""
    return (f"{used / _GIB:.2f}", *_beside(used / _GIB, estimate and estimate / _GIB))


def _beside(value: float, expected: float | None) -> tuple[str, str]:
    return ("", "") if not expected else (_short(expected), f"{value / expected:.0%}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    given = Path(sys.argv[1])
    write_gpu_page(given, given.with_suffix(".html"))
