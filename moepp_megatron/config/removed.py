"""Settings that earlier versions had.

A resolved configuration names every setting, so that of an old run names these. The value that
changes nothing is left out; any other is refused with the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By name: the value that is what every run does now, and what to do about another one.
REMOVED: dict[str, tuple[Any, str]] = {
    "model.implementation": ("gpt", "leave it out: the weights are those of a GPTModel"),
    "routing_guard.safe_ramp": (20, "leave it out: safe mode ends at once"),
    "routing_guard.force_ffn": (
        {"tokens": "high_loss", "token_ids": [], "share": 0.1, "decay": 0.99},
        "leave it out: no action forces FFN experts on chosen tokens",
    ),
}


def without_removed(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mapping of sections without removed settings that have the value that changes nothing."""
    kept = dict(content)
    for name, (value, _) in REMOVED.items():
        section, _, key = name.partition(".")
        keys = kept.get(section)
        if isinstance(keys, Mapping) and key in keys and keys[key] == value:
            kept[section] = {other: keys[other] for other in keys if other != key}
    return kept
