"""A simulation's assumptions about the cluster, set by `--assume NAME=VALUE`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any

from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.planning.simulation.contention import Fabric
from moepp_megatron.workbench.planning.simulation.faults import Faults

# Name: (rule in words, lowest, highest, whole number).
_RULES: dict[str, tuple[str, float, float, bool]] = {
    "slow_nodes": ("a share from 0 to 1", 0.0, 1.0, False),
    "slow_factor": ("a factor from 1 to 100", 1.0, 100.0, False),
    "mtbf_hours": ("hours above 0", 1e-3, 1e12, False),
    "restart_s": ("seconds from 0", 0.0, 1e9, False),
    "save_s": ("seconds from 0", 0.0, 1e9, False),
    "checkpoint_s": ("seconds from 1", 1.0, 1e9, False),
    "leaf_nodes": ("a whole number from 1", 1, 1e6, True),
    "oversubscription": ("a factor from 1 to 1000", 1.0, 1000.0, False),
    "hashed_flows": ("a whole number from 0 to 1000", 0, 1000, True),
    "days": ("days above 0 and up to 3650", 1e-3, 3650.0, False),
    "runs": ("a whole number from 1 to 10000", 1, 10_000, True),
    "seed": ("a whole number from 0", 0, 2**32 - 1, True),
}


@dataclass(frozen=True)
class Assumptions:
    """All assumptions.

    Attributes:
        faults: Slow nodes, failures, checkpoints.
        fabric: The network beyond nodes.
        days: Length of a run whose goodput is simulated.
        runs: Number of such runs.
        seed: Seed of all random draws.
    """

    faults: Faults = field(default_factory=Faults)
    fabric: Fabric = field(default_factory=Fabric)
    days: float = 30.0
    runs: int = 100
    seed: int = 0


def parse_assumptions(texts: Iterable[str]) -> Assumptions:
    """Assumptions with these changes.

    Raises:
        ConfigError: If a name is unknown, or a value is not a number or out of range.
    """
    found = Assumptions()
    for text in texts:
        name, _, value = text.partition("=")
        if name not in _RULES:
            near = get_close_matches(name, _RULES, 1, cutoff=0.5)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(_RULES)}"
            raise ConfigError(f"--assume ({text}) must be NAME=VALUE of a known name; {remedy}")
        found = _changed(found, name, _number(name, value))
    return found


def _number(name: str, text: str) -> float | int:
    rule, lowest, highest, is_whole = _RULES[name]
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    is_legal = isfinite(number) and lowest <= number <= highest
    if not is_legal or (is_whole and number != int(number)):
        raise ConfigError(
            f"--assume {name} ({text}) must be {rule}; use for example {name}={_example(name)}"
        )
    return int(number) if is_whole else number


def _example(name: str) -> str:
    base = Assumptions()
    for part in (base.faults, base.fabric, base):
        value = getattr(part, name, None)
        if value is not None:
            return f"{value:g}"
    return "1800"


def _changed(found: Assumptions, name: str, value: float | int) -> Assumptions:
    # A field whose name is only known at run time.
    change: dict[str, Any] = {name: value}
    if hasattr(found.faults, name):
        return replace(found, faults=replace(found.faults, **change))
    if hasattr(found.fabric, name):
        return replace(found, fabric=replace(found.fabric, **change))
    return replace(found, **change)
