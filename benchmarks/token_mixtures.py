"""Mixtures of another text against the detector of shifts by token ids; nothing is trained.

    python -m benchmarks.token_mixtures --out FOLDER [--set prove]

Each pair of corpora (`fault_corpora`): 150 batches of one, then 30 in which a tenth or a fifth of
the sequences is of the other, 48 sequences of 64 tokens a batch as in `routing_faults`. And each
corpus for many batches alone, in runs of 400 steps, the first of which say nothing. The settings of
`observe/shift/tokens.py` were chosen by `--set choose`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fault_corpora import CHOOSE, PROVE, Corpora, Mixture
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.tokens import GROUPS, TokenDetector, group_of

SEQUENCES, LENGTH = 48, 64
BEFORE, WITHIN, HEALTHY = 150, 30, 400
SHARES = (0.1, 0.2)
_KINDS = {"choose": CHOOSE, "prove": PROVE}
_SEEDS = {"choose": 101, "prove": 201}
# Nothing is like noise, so that it says nothing about healthy batches.
_NOISE = "noise"
Groups = dict[str, NDArray[np.int64]]


def batch(chance: np.random.Generator, groups: Groups, mixture: Mixture) -> NDArray[np.float64]:
    """[GROUPS] tokens of each group in a batch of sequences from anywhere in the corpora."""
    counts = np.zeros(GROUPS)
    kinds = chance.choice(list(mixture), size=SEQUENCES, p=list(mixture.values()))
    for kind in mixture:
        starts = chance.integers(len(groups[kind]) - LENGTH, size=int((kinds == kind).sum()))
        places = starts[:, None] + np.arange(LENGTH)
        counts += np.bincount(groups[kind][places].ravel(), minlength=GROUPS)
    return counts


def told_after(groups: Groups, base: str, other: str, share: float, seed: int) -> int | None:
    """Steps from the beginning of a mixture to the alarm; None without one."""
    chance, monitor = np.random.default_rng(seed), TokenDetector(ShiftSection())
    for _ in range(BEFORE):
        monitor.add(batch(chance, groups, {base: 1.0}))
    for step in range(1, WITHIN + 1):
        if monitor.add(batch(chance, groups, {base: 1.0 - share, other: share})) > 1.0:
            return step
    return None


def alarms(groups: Groups, base: str, seed: int) -> tuple[int, int]:
    """False alarms of a healthy run, and its steps that are judged."""
    chance, monitor = np.random.default_rng(seed), TokenDetector(ShiftSection())
    values = np.array([monitor.add(batch(chance, groups, {base: 1.0})) for _ in range(HEALTHY)])
    above = values > 1.0
    return int((above[1:] & ~above[:-1]).sum()), int((~np.isnan(values)).sum())


def lines(groups: Groups, seed: int, runs: int) -> Iterator[str]:
    """What was found of each share, what was missed, and the false alarms."""
    bases = [kind for kind in groups if kind != _NOISE]
    for share in SHARES:
        pairs = [(base, other) for base in bases for other in groups if base != other]
        found = {
            pair: told_after(groups, *pair, share, seed + number)
            for number, pair in enumerate(pairs)
        }
        steps = [step for step in found.values() if step is not None]
        missed = [f"{other} in {base}" for (base, other), step in found.items() if step is None]
        yield (
            f"{share:.0%}: {len(steps)} of {len(found)} told within {WITHIN} steps, median "
            f"{np.median(steps):g}; missed: {', '.join(missed) or 'none'}"
        )
    counts = [alarms(groups, base, seed + run) for base in bases for run in range(runs)]
    false, judged = np.sum(counts, axis=0)
    yield f"healthy: {false} false alarms in {judged:,} judged steps"


def main() -> None:
    """Print the numbers of a set."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="prove", choices=sorted(_KINDS))
    parser.add_argument("--runs", type=int, default=12, help="healthy runs of each corpus")
    arguments = parser.parse_args()
    corpora = Corpora(arguments.out / "corpora")
    groups = {kind: group_of(corpora.tokens(kind)) for kind in _KINDS[arguments.set]}
    for line in lines(groups, _SEEDS[arguments.set], arguments.runs):
        print(line, flush=True)


if __name__ == "__main__":
    main()
