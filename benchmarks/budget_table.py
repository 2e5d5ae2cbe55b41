"""Tables, which docs/budget.md sums up, of what `benchmarks.budget_holds` has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.markdown import table

# Steps of a run, sequences of a step, and the steps of an upcycled run before its upcycling.
STEPS, BATCH, BEFORE = 240, 96, 100


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        part: What it is for: before, proved, loss or upcycled.
        corpus: Name of the text.
        seed: Of weights and of the order of the text.
        label: What is particular about it; with the others it makes the name.
        moe: Settings of `moe`.
        batch: Sequences of a step.
        same_share_as: Name of a run whose measured FFN experts per token are the target.
        over_last: Steps, of that run's last ones, that they are measured over.
    """

    part: str
    corpus: str
    seed: int
    label: str
    moe: dict[str, Any] = field(default_factory=dict)
    batch: int = BATCH
    same_share_as: str | None = None
    over_last: int = 0

    @property
    def name(self) -> str:
        """Name of the run and of its file."""
        return f"{self.part}-{self.corpus}-{self.seed}-{self.label}"


Found = Sequence[tuple[Run, dict[str, Any]]]

# Single steps scatter with the text in them, so "at all times" is judged on means of as many steps.
WINDOW = 10
# A run has converged where no later window is further away.
WITHIN = 0.1


def held(record: dict[str, Any]) -> dict[str, float]:
    """Return how far a run was from its target, as a fraction of it.

    Returns:
        `third`, its mean over the last third; `layer`, the worst layer's; `settled`, the step from
        which the model stays within `WITHIN`; `later` and `layer_later`, the worst window of the
        model and of a layer in the second half; `load`, the busiest FFN expert over their mean in
        the last third.
    """
    off = np.array(record["layers"]) / record["target"] - 1.0
    third = off[-len(off) // 3 :]
    windows = np.lib.stride_tricks.sliding_window_view(off, WINDOW, axis=0).mean(axis=-1)
    outside = np.flatnonzero(np.abs(windows.mean(axis=1)) > WITHIN)
    later = windows[len(off) // 2 :]
    return {
        "third": float(third.mean()),
        "layer": float(_furthest(third.mean(axis=0))),
        "settled": float(outside[-1] + 2 if len(outside) else 1),
        "later": float(_furthest(later.mean(axis=1))),
        "layer_later": float(_furthest(later.ravel())),
        "load": float(np.mean(record["load"][-len(off) // 3 :])),
    }


def _furthest(values: np.ndarray) -> float:
    return float(values[np.abs(values).argmax()])


def tables(runs: Sequence[Run], out: Path) -> str:
    """All tables of what is there, in Markdown."""
    found = [
        (run, json.loads((out / f"{run.name}.json").read_text()))
        for run in runs
        if (out / f"{run.name}.json").exists()
    ]
    parts = [f"{len(found)} of {len(runs)} runs\n"]
    for part in ("before", "proved"):
        heads = [f"{part}: text, seed, what", "last third", "its worst layer"]
        heads += ["within 10% from step", "worst 10 steps of the second half", "of a layer"]
        rows = [_row(*one) for one in found if one[0].part == part]
        parts.append(table([*heads, "load", "loss"], rows))
    return "\n".join([*parts, _losses(found), _upcycled(found)])


def _what(run: Run) -> str:
    return f"{run.corpus}, {run.seed}, {run.label}"


def _row(run: Run, record: dict[str, Any]) -> list[str]:
    far = held(record)
    settled = int(far["settled"])
    return [
        _what(run),
        f"{far['third']:+.1%}",
        f"{far['layer']:+.1%}",
        "never" if settled > len(record["loss"]) - WINDOW else str(settled),
        f"{far['later']:+.1%}",
        f"{far['layer_later']:+.1%}",
        f"{far['load']:.2f}",
        f"{_last_loss(record):.3f}",
    ]


def _last_loss(record: dict[str, Any]) -> float:
    return float(np.mean(record["loss"][-len(record["loss"]) // 6 :]))


def _losses(found: Found) -> str:
    """Fixed tau beside the controller at the same measured share."""
    heads = ["text, seed, FFN experts per token as in", "fixed tau: all steps, last third"]
    heads += ["the controller's", "load, fixed tau and controller", "loss, fixed tau"]
    by_name = {run.name: record for run, record in found}
    rows: list[list[str]] = []
    differences: dict[int, list[float]] = {}
    for run, record in found:
        if (fixed := by_name.get(run.same_share_as or "")) is None:
            continue
        both = (fixed, record)
        before, after = map(_last_loss, both)
        differences.setdefault(run.over_last, []).append(after - before)
        shares = (
            ", ".join(f"{np.mean(each['layers'][-last:]):.3f}" for last in (STEPS, STEPS // 3))
            for each in both
        )
        loads = ", ".join(f"{held(each)['load']:.2f}" for each in both)
        losses = (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        rows.append([_what(run), *shares, loads, *losses])
    text = table([*heads, "controller", "difference"], rows)
    for last, of_kind in differences.items():
        if len(of_kind) > 1:
            error = np.std(of_kind, ddof=1) / len(of_kind) ** 0.5
            said = f"{np.mean(of_kind):+.4f}, standard error {error:.4f}, {len(of_kind)} pairs"
            text += f"\nMean difference at the share of the last {last} steps: {said}\n"
    return text


def _upcycled(found: Found) -> str:
    steps = (5, 10, 20, 40, 60, 100, 140)
    heads = ["upcycled: text, seed, rule", f"share after {', '.join(map(str, steps))} steps"]
    heads += ["first at phi", "least share", "last third"]
    rows = []
    for run, record in found:
        if run.part != "upcycled":
            continue
        # Every rule here has two experts a token.
        shares = np.mean(record["layers"], axis=1)[BEFORE:] / 2
        phi, losses = record["target"] / 2, record["loss"]
        at_phi = np.flatnonzero(shares <= phi)
        parts = (losses[BEFORE - 20 : BEFORE], losses[BEFORE : BEFORE + 20], losses[-40:])
        rows.append(
            [
                _what(run),
                ", ".join(f"{shares[step - 1]:.2f}" for step in steps),
                str(at_phi[0] + 1) if len(at_phi) else "never",
                f"{shares.min():.2f}",
                f"{shares[-len(shares) // 3 :].mean():.3f} of {phi:.3f}",
                ", ".join(f"{np.mean(part):.3f}" for part in parts),
            ]
        )
    last = "loss of the 20 steps before, of steps 1 to 20, of the last 40"
    return table([*heads, last], rows)
