"""The reference pages of the documentation site, generated from the package; git ignores them.

`python -m benchmarks.pages` writes them below docs/, as `./launch/docs.sh` does before it builds
the site: every setting, command, metric and argument of Megatron-LM, and the Grafana dashboard.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from typer.cli import get_docs_for_click

from benchmarks.grafana import dashboard
from benchmarks.markdown import table
from moepp_megatron.catalogue import IN_LAYERS, METRICS, OF_RECORD, Metric
from moepp_megatron.cli.main import app
from moepp_megatron.config import megatron_flags as flags
from moepp_megatron.config.reference import _SectionReference, section_references
from moepp_megatron.features.guard.settings import COUNTED, GUARD_METRICS, MEASURED
from moepp_megatron.observe.tensorboard import _tag_of
from moepp_megatron.tools.report.live import prometheus

DOCS = Path(__file__).parents[1] / "docs"


def _code(name: str) -> str:
    return f"`{name}`" if name else ""


# ---- settings


def settings() -> str:
    """Every setting with default, unit, range and meaning."""
    head = """\
# Settings

Set any of them in a YAML file or on the command line (`moe.tau=0.5`). The unit `1` is a pure
number, and `-` is no quantity. What must hold between settings is checked at the start
(`moepp train CONFIG --dry-run`). `moepp config keys [PREFIX]` prints the same in a terminal, and
`moepp config show CONFIG` what a configuration sets and where.
"""
    return "\n".join([head, *(part for each in section_references() for part in _section(each))])


def _section(section: _SectionReference) -> Iterator[str]:
    yield f"## {section.name}\n\n{section.meaning}\n"
    if not section.settings:
        return
    rows = [
        (
            f"`{each.key}`",
            "must be given" if each.default is None else f"`{each.default}`",
            each.unit,
            ", ".join(each.allowed),
            each.meaning,
        )
        for each in section.settings
    ]
    yield table(("setting", "default", "unit", "range", "what it is"), rows)


# ---- commands


def commands() -> str:
    """Every command with its arguments and options."""
    head = """\
# Commands

Each command's `--help` prints the same in a terminal. A command's exit status is 0 when it is done,
2 for a wrong configuration or usage, 3 where this machine cannot do it, and 75 when it was asked to
stop and has written a checkpoint.
"""
    command: Any = typer.main.get_command(app)
    _with_examples(command)
    context = typer.Context(command, info_name="moepp", **command.context_settings)
    pages = get_docs_for_click(obj=command, ctx=context, name="moepp", indent=1)
    return f"{head}\n{pages.strip()}\n"


def _with_examples(command: Any) -> None:
    """Put examples into blocks, and whole first sentences into lists, where click cuts them."""
    paragraph = " ".join(command.help.split("\n\n")[0].split())
    command.short_help = paragraph.partition(". ")[0].removesuffix(".") + "."
    examples = textwrap.dedent(command.epilog.split("\n", 2)[2])
    command.epilog = f"**Examples**:\n\n```bash\n{examples}\n```"
    for inner in getattr(command, "commands", {}).values():
        _with_examples(inner)


# ---- metrics


def metrics() -> str:
    """Every metric: key, unit, meaning, and its names in TensorBoard and Prometheus."""
    head = """\
# Metrics

What a record of `metrics.jsonl` holds, in which unit, and under which name TensorBoard and
Prometheus show it ([monitor](monitor.md)). Every number at Prometheus also has the label `run`. A
metric without a key exists in Prometheus only.

## In each record
"""
    names = ("key in `metrics.jsonl`", "meaning", "unit", "TensorBoard", "Prometheus", "labels")
    rows = [
        (
            _code(key),
            row.meaning,
            row.unit,
            _tag(key, row),
            *_served(row.prometheus, prometheus.OF_RECORDS[key].labels),
        )
        for key, row in OF_RECORD.items()
    ]
    idlest, other = IN_LAYERS["min_ffn_load"], prometheus.OTHER
    rows.append(("", idlest.meaning, "", "", *_served(idlest.prometheus, idlest.labels)))
    rows.append(("", other.meaning, "", "", *_served(other.name, other.labels)))
    health = [(_code(name), IN_LAYERS[name].unit, IN_LAYERS[name].meaning) for name in MEASURED]
    run = [(*_served(each.name, each.labels), each.meaning) for each in prometheus.OF_RUN]
    guard = [(_code(name), _place(name), METRICS[name].with_unit) for name in GUARD_METRICS]
    return "\n".join(
        [
            head,
            table(names, rows),
            "## Router health\n",
            table(("of `router_health`", "unit", "meaning"), health),
            "## Of the run\n",
            table(("of the run", "labels", "meaning"), run),
            "## Metrics of guard rules\n",
            table(("metric", "of", "meaning"), guard),
        ]
    )


def _place(name: str) -> str:
    if name in COUNTED:
        return "each layer"
    return "each layer, where measured" if name in MEASURED else "the model"


def _served(name: str, labels: str) -> tuple[str, str]:
    return _code(name), labels.replace(",", ", ")


def _tag(key: str, row: Metric) -> str:
    if key == "step":
        return ""
    return _code(f"{row.group}/..." if row.labels else _tag_of(key))


# ---- Megatron-LM's arguments


def megatron_flags() -> str:
    """Megatron-LM's arguments and their settings, as `moepp config from-megatron` reads them."""
    known = {one.name: one for section in section_references() for one in section.settings}
    same = [(_flag(name), f"`{key}`", known[key].meaning) for name, key in flags.SETTINGS.items()]
    switches = [
        (_flag(name), _assigned(key, value), known[key].meaning)
        for name, (key, value) in flags.SWITCHES.items()
    ]
    derived = [(_flag(name), meaning) for name, meaning in flags.DERIVED.items()]
    absents = [flags.ABSENT, *(values for _, _, values in flags.ABSENT_WITH)]
    absent = [
        (_assigned(key, value), known[key].meaning)
        for values in absents
        for key, value in values.items()
    ]
    parts = (
        """\
# Megatron-LM's arguments

`moepp config from-megatron FILE` uses the same tables: it turns a command line of Megatron-LM into
a configuration and lists what it could not translate. An argument that is not on this page has no
counterpart.

## The same value
""",
        table(("argument", "setting", "what it is"), same),
        "## Switches\n",
        table(("argument", "setting", "what it is"), switches),
        "## Derived, or given by hand\n",
        table(("argument", "setting"), derived),
        """\
## Absent arguments

Where an argument is absent and this project's default differs from Megatron-LM's, the translation
writes Megatron-LM's.
""",
        table(("setting", "what it is"), absent),
        "## Needed arguments\n",
        "This project's models have these; the translation names those that a file lacks.\n",
        _list([_flag(name, value) for name, value in flags.ALWAYS.items()]),
        "## Without a setting\n",
        "Speed, logging and files, which need no setting here or which other settings imply:\n",
        _list([_flag(name) for name in sorted(flags.WITHOUT_A_SETTING)]),
    )
    return "\n".join(parts)


def _flag(name: str, value: str = "true") -> str:
    return f"`--{name}`" if value == "true" else f"`--{name} {value}`"


def _assigned(key: str, value: object) -> str:
    return f"`{key}={str(value).lower() if isinstance(value, bool) else value}`"


def _list(items: list[str]) -> str:
    return ", ".join(items) + "\n"


def grafana() -> str:
    """The Grafana dashboard as JSON."""
    return json.dumps(dashboard(), indent=2) + "\n"


# Generated file below docs/, and what makes it.
PAGES = {
    "settings.md": settings,
    "commands.md": commands,
    "metrics.md": metrics,
    "how_to/from_megatron_lm_flags.md": megatron_flags,
    "grafana/moepp.json": grafana,
}


if __name__ == "__main__":
    for file, page in PAGES.items():
        (DOCS / file).write_text(page(), encoding="utf-8")
