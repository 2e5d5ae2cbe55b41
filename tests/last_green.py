"""Records the last run of all matrix and slow tests in which every one passed."""

import json
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

# What `./launch/test.sh --last-green` shows.
LAST_GREEN = Path(__file__).with_suffix(".json")
# Marks of what `./launch/test.sh -m 'matrix or slow'` runs.
LONG = ("matrix", "slow")


def record(config, stats, path=LAST_GREEN):
    """Write down that all long tests passed, if this run left none of them out."""
    found = {name: [each for each in stats.get(name, []) if _is_long(each)] for name in stats}
    option = config.option
    chosen = option.quick or option.keyword or option.deselect
    everything = config.args_source is not pytest.Config.ArgsSource.ARGS and not chosen
    whole = everything and option.markexpr in ("", " or ".join(LONG))
    passed = [each for each in found.get("passed", []) if each.when == "call"]
    if not whole or not passed or stats.get("failed") or stats.get("error"):
        return
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True)
    said = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "passed": len(passed),
        "skipped": sorted(each.nodeid for each in found.get("skipped", [])),
        "minutes": round(sum(each.duration for each in passed) / 60, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "megatron-core")},
    }
    path.write_text(json.dumps(said, indent=1) + "\n", encoding="ascii")


def _is_long(found):
    """Take an item or a report."""
    return any(mark in getattr(found, "keywords", ()) for mark in LONG)
