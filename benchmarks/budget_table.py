"""Tables, which docs/budget.md sums up, of what `benchmarks.budget_holds` has measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
# A run has settled where no later window is further away.
WITHIN = 0.1


def held(record: dict[str, Any]) -> dict[str, float]:
    """How far a run was from its target, as parts of it.

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
    lines = [f"{len(found)} of {len(runs)} runs"]
    for part in ("before", "proved"):
        heads = [
            f"{part}: text, seed, what",
            "last third",
            "its worst layer",
            "within 10% from step",
            "worst 10 steps of the second half",
            "of a layer",
            "load",
            "loss",
        ]
        lines += ["", *_head(heads), *(_row(*one) for one in found if one[0].part == part)]
    return "\n".join([*lines, "", *_losses(found), "", *_upcycled(found)])


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(run: Run, record: dict[str, Any]) -> str:
    far = held(record)
    settled = int(far["settled"])
    return _line(
        [
            f"{run.corpus}, {run.seed}, {run.label}",
            f"{far['third']:+.1%}",
            f"{far['layer']:+.1%}",
            "never" if settled > len(record["loss"]) - WINDOW else str(settled),
            f"{far['later']:+.1%}",
            f"{far['layer_later']:+.1%}",
            f"{far['load']:.2f}",
            f"{_last_loss(record):.3f}",
        ]
    )


def _last_loss(record: dict[str, Any]) -> float:
    return float(np.mean(record["loss"][-len(record["loss"]) // 6 :]))


def _losses(found: Found) -> list[str]:
    """Fixed tau beside the controller at the same measured share."""
    lines = _head(
        [
            "text, seed, FFN experts per token as in",
            "fixed tau: all steps, last third",
            "the controller's",
            "load, fixed tau and controller",
            "loss, fixed tau",
            "controller",
            "difference",
        ]
    )
    by_name = {run.name: record for run, record in found}
    differences: dict[int, list[float]] = {}
    for run, record in found:
        fixed = by_name.get(run.same_share_as or "")
        if fixed is None:
            continue
        both = (fixed, record)
        losses = [_last_loss(r) for r in both]
        difference = losses[1] - losses[0]
        differences.setdefault(run.over_last, []).append(difference)
        cells = [f"{run.corpus}, {run.seed}, {run.label}"]
        for each in both:
            shares = [np.mean(each["layers"][-last:]) for last in (STEPS, STEPS // 3)]
            cells.append(", ".join(f"{share:.3f}" for share in shares))
        cells.append(", ".join(f"{held(r)['load']:.2f}" for r in both))
        cells += [*(f"{loss:.3f}" for loss in losses), f"{difference:+.3f}"]
        lines.append(_line(cells))
    for last, of_kind in differences.items():
        if len(of_kind) > 1:
            error = np.std(of_kind, ddof=1) / len(of_kind) ** 0.5
            text = f"{np.mean(of_kind):+.4f}, standard error {error:.4f}, {len(of_kind)} pairs"
            lines += ["", f"Mean difference at the share of the last {last} steps: {text}"]
    return lines


def _upcycled(found: Found) -> list[str]:
    steps = (5, 10, 20, 40, 60, 100, 140)
    lines = _head(
        [
            "upcycled: text, seed, rule",
            f"share after {', '.join(map(str, steps))} steps",
            "first at phi",
            "least share",
            "last third",
            "loss of the 20 steps before, of steps 1 to 20, of the last 40",
        ]
    )
    for run, record in found:
        if run.part != "upcycled":
            continue
        # Every rule here has two experts a token.
        shares = np.mean(record["layers"], axis=1)[BEFORE:] / 2
        phi, losses = record["target"] / 2, record["loss"]
        at_phi = np.flatnonzero(shares <= phi)
        parts = (losses[BEFORE - 20 : BEFORE], losses[BEFORE : BEFORE + 20], losses[-40:])
        cells = [f"{run.corpus}, {run.seed}, {run.label}"]
        cells.append(", ".join(f"{shares[step - 1]:.2f}" for step in steps))
        cells.append(str(at_phi[0] + 1) if len(at_phi) else "never")
        cells.append(f"{shares.min():.2f}")
        cells.append(f"{shares[-len(shares) // 3 :].mean():.3f} of {phi:.3f}")
        lines.append(_line([*cells, ", ".join(f"{np.mean(part):.3f}" for part in parts)]))
    return lines
