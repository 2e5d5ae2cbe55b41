"""Which drift correction suits the budget's bias? Margins of real runs, replayed.

    python -m benchmarks.budget_drift OUT

A step's margins (`moe/margins.py`) say which share any bias would have given in it. So one run, as
in `benchmarks.budget_holds`, judges every `response` and `drift` (`moe/budget.py`) at once, as if
the model had been trained the same. Runs are recorded in `OUT` once, half a minute each on one
core. They chose the defaults; `proved` runs of `benchmarks.budget_holds` are other texts and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.budget_holds import _budget, measure
from benchmarks.budget_table import BATCH, STEPS, Run, held
from moepp_megatron.moe.budget import Budget, BudgetController
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import edges, quantile
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.rank import RankEnvironment

# Text, seed, FFN experts a token, sequences a step.
RUNS = [
    ("prose", 1, 0.3, BATCH),
    ("code", 2, 0.3, BATCH),
    ("prose", 3, 0.6, BATCH),
    ("code", 4, 0.6, BATCH),
    ("prose", 5, 1.0, BATCH),
    ("code", 6, 0.3, BATCH),
    ("prose", 7, 0.3, BATCH),
    ("prose", 8, 0.6, BATCH // 4),
    ("code", 9, 0.6, BATCH // 4),
    ("code", 10, 1.0, BATCH),
]
CHOICES = [(response, 0.0) for response in (0.7, 1.0)] + [
    (response, drift) for response in (0.5, 0.7, 1.0) for drift in (0.15, 0.3, 0.4, 0.6, 0.9)
]
TOPK = 2


def record(out: Path) -> None:
    """Make the runs that are missing."""
    cpu_support.install()
    distributed.start(RankEnvironment())
    for corpus, seed, target, batch in RUNS:
        path = _path(out, corpus, seed)
        if not path.exists():
            margins, biases = _recorded(
                Run("drift", corpus, seed, f"{target:g}", _budget(target), batch), out
            )
            np.savez(path, margins=margins, biases=biases)
            print(path.name, flush=True)
    distributed.stop()


def _path(out: Path, corpus: str, seed: int) -> Path:
    return out / f"margins-{corpus}-{seed}.npz"


def _recorded(run: Run, out: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[steps, layers, B] margins of a run, and the bias [steps, layers] that they hold beside."""
    margins, steps = [], []
    observe = BudgetController.observe

    def observed(
        self: BudgetController, selected_LE: Tensor, step: int, margins_LB: Tensor | None = None
    ) -> Tensor | None:
        # Runs of before the correction, which no choice of it has shaped.
        self.budget = replace(self.budget, drift=0.0)
        moved = observe(self, selected_LE, step, margins_LB)
        assert margins_LB is not None
        assert moved is not None
        margins.append(margins_LB.numpy().copy())
        steps.append(moved[:, 0].double().numpy())
        return moved

    BudgetController.observe = observed  # type: ignore[method-assign]
    try:
        measure(run, out)
    finally:
        BudgetController.observe = observe  # type: ignore[method-assign]
    moved = np.stack(steps)
    return np.stack(margins), np.cumsum(moved, axis=0) - moved


def replayed(
    margins: NDArray[np.float64], biases: NDArray[np.float64], target: float, budget: Budget
) -> NDArray[np.float64]:
    """[steps, layers] FFN experts a token that a controller would have given."""
    num_steps, num_layers, _ = margins.shape
    controller = BudgetController(budget, MoEPPConfig(8), num_layers)
    bias = np.zeros(num_layers)
    taken = np.zeros((num_steps, num_layers))
    for step in range(num_steps):
        for layer in range(num_layers):
            counts = margins[step, layer]
            # Each of K selections has a margin.
            selections = int(counts.sum())
            away = bias[layer] - biases[step, layer]
            taken[step, layer] = TOPK * _up_to(counts, away) / selections
            lacks = quantile(counts.tolist(), target / TOPK * selections) - away
            bias[layer] += controller._measured_step(layer, lacks, lacks)
    return taken


def _up_to(counts: NDArray[np.float64], value: float) -> float:
    """Margins up to a value; undoes `quantile`."""
    ends = np.array(edges())
    below = np.concatenate([[0], np.cumsum(counts)])[: len(ends) + 1]
    return float(np.interp(value, ends, below[1:]))


def _rows(out: Path) -> Iterator[str]:
    yield "| response, drift | last third | its worst layer | worst 10 steps of the second half |"
    yield "|---|---|---|---|"
    runs = [(np.load(_path(out, corpus, seed)), target) for corpus, seed, target, _ in RUNS]
    for response, drift in CHOICES:
        budget = Budget(0.5, "bias", response=response, drift=drift)
        far = []
        for run, target in runs:
            taken = replayed(run["margins"], run["biases"], target, budget)
            far.append(held({"layers": taken, "target": target, "load": np.ones(STEPS)}))
        names = ("third", "layer", "layer_later")
        worst = [max(abs(each[name]) for each in far) for name in names]
        mean = np.mean([abs(each["layer_later"]) for each in far])
        cells = f"{worst[0]:.1%} | {worst[1]:.1%} | {worst[2]:.1%}, mean {mean:.1%}"
        yield f"| {response:g}, {drift:g} | {cells} |"


def main() -> None:
    """Record what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the recorded runs")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    record(out)
    print("\n".join(_rows(out)))


if __name__ == "__main__":
    main()
