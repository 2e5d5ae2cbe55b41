"""Settings that earlier versions had.

A resolved configuration names every setting, so that of an old run names these. The value that
changes nothing is left out; any other is refused with the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# By name: the value that is what every run does now, and what to do about another one.
REMOVED: dict[str, tuple[Any, str]] = {
    "model.implementation": ("gpt", "leave it out: the weights are those of a GPTModel"),
    "routing_guard.safe_ramp": (20, "leave it out: safe mode ends at once"),
    "routing_guard.force_ffn": (
        {"tokens": "high_loss", "token_ids": [], "share": 0.1, "decay": 0.99},
        "leave it out: no action forces FFN experts on chosen tokens",
    ),
    "routing_guard.tau_factor": (2.0, "leave it out: moe.budget is what holds the FFN share"),
    "routing_guard.tau_half_life": (50.0, "leave it out: moe.budget is what holds the FFN share"),
    "routing_guard.shift": (
        {
            "window": 10,
            "reference": None,
            "fixed_after": None,
            "span": 3,
            "lag": 0,
            "memory": 6,
            "warmup": 8,
            "false_alarm_steps": 10_000.0,
            "threshold": None,
        },
        "leave it out, or use routing_guard.false_alarm_steps",
    ),
    "resilience.guard_window": (128, "leave it out: losses are compared with their course"),
}
# Of each rule of `routing_guard.rules`; a resolved configuration has them as null.
_OF_RULES = ("of_steps", "clear_for_steps", "scope", "min_steps_between", "max_firings")
# Default rules of the guard that are gone: what changes one is complete by what it was.
_GONE_RULES: dict[str, dict[str, Any]] = {
    "many_ffn_experts": {
        "metric": "mean_ffn_to_target",
        "for_steps": 100,
        "above": 1.5,
        "clear": 1.3,
    },
    "dead_expert": {"metric": "min_ffn_load", "for_steps": 75, "below": 0.01, "clear": 0.05},
}


def without_removed(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """A mapping of sections without removed settings that have the value that changes nothing."""
    kept = dict(content)
    for name, (value, _) in REMOVED.items():
        section, _, key = name.partition(".")
        keys = kept.get(section)
        if isinstance(keys, Mapping) and key in keys and keys[key] == value:
            kept[section] = {other: keys[other] for other in keys if other != key}
    guard = kept.get("routing_guard")
    if isinstance(guard, Mapping) and isinstance(guard.get("rules"), list):
        kept["routing_guard"] = {**guard, "rules": list(_rules(guard["rules"]))}
    return kept


def _rules(rules: Iterable[Any]) -> Iterator[Any]:
    """Rules of the guard, as this version has them."""
    for rule in rules:
        if not isinstance(rule, Mapping):
            yield rule
            continue
        given = {k: v for k, v in rule.items() if v is not None or k not in _OF_RULES}
        gone = _GONE_RULES.get(str(rule.get("name")))
        if gone is None or given.get("metric") is not None:
            yield given
        elif given.get("action") != "none":
            own = {k: v for k, v in given.items() if v is not None}
            # A limit of its own takes the place of the old one and of the way back.
            names = ("metric", "for_steps") if {"above", "below"} & own.keys() else tuple(gone)
            yield {name: gone[name] for name in names} | own
