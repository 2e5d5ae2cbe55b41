"""The table of `routing_faults`: told or not, delay, false alarms, loss against no guard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

_SAVED = 150
_SHIFTS = ("data_shift", "loss_shift", "token_shift")
# Losses are compared as means over so many steps.
_MEAN = 10


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each case, then the sums."""
    lines = ["| what | told after | said | acted after | loss |", "|---|---|---|---|---|"]
    lines += [_row(result, results) for result in results]
    return "\n".join([*lines, "", *_sums(results)])


def _start(result: dict[str, Any]) -> int:
    """The step behind which something happens: a wrong learning rate is wrong from the first."""
    return 0 if result["case"]["kind"] == "rate" else _SAVED


def _begins(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Alerts of beginnings behind the base run."""
    start = _start(result)
    return [
        alert
        for alert in result["alerts"]
        if alert["step"] > start and not alert["action"].startswith("end")
    ]


def told(result: dict[str, Any]) -> int | None:
    """Steps from the change to the first alert of a shift; None without one."""
    start = _start(result)
    steps = [alert["step"] - start for alert in _begins(result) if alert["rule"] in _SHIFTS]
    return min(steps, default=None)


def acted(result: dict[str, Any]) -> int | None:
    """Steps from the fault to the first action; None without one."""
    start = _start(result)
    steps = [alert["step"] - start for alert in _begins(result) if alert["action"] != "warn"]
    return min(steps, default=None)


def jump(result: dict[str, Any]) -> float:
    """Loss of the first five steps above that of the ten before, in nats."""
    return float(np.mean(result["losses"][:5]) - np.mean(result["before"][-_MEAN:]))


def _row(result: dict[str, Any], results: Iterable[dict[str, Any]]) -> str:
    case = result["case"]
    rules = {alert["rule"]: alert.get("cause") for alert in _begins(result)}
    said = ", ".join(f"{rule} ({cause})" if cause else rule for rule, cause in rules.items())
    what = f"{case['kind']} {case['base']}"
    if case["other"]:
        what += f" -> {case['share']:.0%} {case['other']}"
    if case["kind"] in ("collapse", "dead"):
        what += f", layer {case['layer'] or 'all'}{'' if case['guarded'] else ', no guard'}"
    if case["kind"] == "rate":
        what += f" x{case['factor']:g}"
    if case["kind"] == "burst":
        what += f", {case['steps']} batches"
    loss = "" if "before" not in result else f"{jump(result):+.2f} at once"
    if case["kind"] in ("collapse", "dead"):
        loss += f", {excess(result, results)}"
    ended = f"; ended: {result['ended']}" if result["ended"] else ""
    cells = (what, told(result), said + ended, acted(result), loss)
    return "| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |"


def excess(result: dict[str, Any], results: Iterable[dict[str, Any]]) -> str:
    """Loss above that of the healthy run of the same batches, around 5, 30 and 60 steps on."""
    case = result["case"]
    healthy = [
        other
        for other in results
        if other["case"]["kind"] == "healthy"
        and (other["case"]["base"], other["case"]["seed"]) == (case["base"], case["seed"])
    ]
    if not healthy:
        return ""
    difference = (
        np.array(result["losses"]) - np.array(healthy[0]["losses"])[: len(result["losses"])]
    )
    means = [difference[at - 5 : at + 5].mean() for at in (5, 30, 60)]
    return "above healthy " + ", ".join(f"{mean:+.3f}" for mean in means)


def _sums(results: list[dict[str, Any]]) -> list[str]:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["case"]["kind"], []).append(result)
    lines = []
    loud = [result for result in kinds.get("switch", []) if abs(jump(result)) > 0.3]
    for name, group, within in (
        ("whole switches with a loss jump over 0.3", loud, 5),
        ("all whole switches", kinds.get("switch", []), 5),
        ("mixtures of 10 to 20%", kinds.get("mixture", []), 30),
    ):
        early = [result for result in group if (told(result) or 10**9) <= within]
        lines.append(f"- {name}: {len(early)} of {len(group)} told within {within} steps")
    healthy = kinds.get("healthy", [])
    # Steps are judged from step 80 on; those of base runs count once.
    steps = sum(len(result["losses"]) + _SAVED - 80 for result in healthy)
    alarms = [
        alert
        for result in healthy
        for alert in result["alerts"]
        if alert["rule"] in _SHIFTS and not alert["action"].startswith("end")
    ]
    actions = [
        alert
        for result in healthy
        for alert in result["alerts"]
        if alert["action"] != "warn" and not alert["action"].startswith("end")
    ]
    lines.append(
        f"- healthy runs: {len(alarms)} false alarms of a shift and {len(actions)} actions in "
        f"{steps} judged steps"
    )
    faults = [result for result in kinds.get("collapse", []) if result["case"]["guarded"]]
    early = [result for result in faults if (acted(result) or 10**9) <= 10]
    lines.append(f"- planted collapses: {len(early)} of {len(faults)} acted on within 10 steps")
    ended = [result["name"] for result in results if result["ended"]]
    lines.append(f"- runs that ended early: {len(ended)} {ended or ''}".rstrip())
    return lines
