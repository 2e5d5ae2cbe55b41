"""`docs/how_to/from_megatron_lm_flags.md`: Megatron-LM's arguments beside the settings.

Write it anew: `python -m benchmarks.megatron_flags_page`.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.metrics_page import table
from moepp_megatron.config import megatron_flags as flags
from moepp_megatron.config.reference import section_references

FILE = Path(__file__).parents[1] / "docs" / "how_to" / "from_megatron_lm_flags.md"
_HEAD = """\
# Megatron-LM's arguments

Written by `python -m benchmarks.megatron_flags_page` from
`moepp_megatron/config/megatron_flags.py`; do not edit. `moepp config from-megatron FILE` uses the
same tables: it turns a command line of Megatron-LM into a configuration and lists what it could
not translate. An argument that is not on this page has no counterpart.
"""
_ABSENT = """\
## Absent arguments

Where an argument is absent and this project's default differs from Megatron-LM's, the translation
writes Megatron-LM's.
"""
_ALWAYS = """\
## Needed arguments

This project's models have these; the translation names those that a file lacks.
"""


def page() -> str:
    """The page."""
    known = {one.name: one for section in section_references() for one in section.settings}
    direct = [(_flag(name), f"`{key}`", known[key].meaning) for name, key in flags.SETTINGS.items()]
    switches = [
        (_flag(name), _assigned(key, value), known[key].meaning)
        for name, (key, value) in flags.SWITCHES.items()
    ]
    derived = [(_flag(name), meaning) for name, meaning in flags.DERIVED.items()]
    absent = [(_assigned(key, value), known[key].meaning) for key, value in flags.ABSENT.items()]
    parts = (
        _HEAD,
        "## The same value\n",
        table(("argument", "setting", "what it is"), direct),
        "## Switches\n",
        table(("argument", "setting", "what it is"), switches),
        "## Worked out, or given by hand\n",
        table(("argument", "setting"), derived),
        _ABSENT,
        table(("setting", "what it is"), absent),
        _ALWAYS,
        _list([_flag(name, value) for name, value in flags.ALWAYS.items()]),
        "## Without a setting\n",
        "Speed, logging and files, which need no setting here or which other settings imply:\n",
        _list([_flag(name) for name in sorted(flags.WITHOUT_A_SETTING)]),
        "Options of torchrun and srun; `moepp train` and `moepp slurm` have their own:\n",
        _list([_flag(name) for name in sorted(flags.LAUNCHER)]),
    )
    return "\n".join(parts)


def _flag(name: str, value: str = "true") -> str:
    return f"`--{name}`" if value == "true" else f"`--{name} {value}`"


def _assigned(key: str, value: object) -> str:
    return f"`{key}={str(value).lower() if isinstance(value, bool) else value}`"


def _list(items: list[str]) -> str:
    return ", ".join(items) + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
