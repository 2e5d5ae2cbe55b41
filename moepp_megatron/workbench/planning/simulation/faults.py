"""Slow nodes, and failures: the share of a long run's time that remains useful."""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, sqrt

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Faults:
    """Faults of a cluster.

    Attributes:
        slow_nodes: Share of nodes whose GPUs compute more slowly, for as long as they are in the
            run. 0.005 and a tenth: MegaScale (arXiv 2402.15627).
        slow_factor: Factor by which their computation takes longer.
        mtbf_hours: Hours between failures of one GPU, whatever fails with it. 50,677: 419
            unexpected interruptions of 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783,
            table 5).
        restart_s: Time from a failure to the first new step: found, diagnosed, started, loaded.
            900: MegaScale finds faults in under 10 minutes and is back within 15 (same paper).
        save_s: Time for which a checkpoint holds up training. 30 is assumed: measure yours.
        checkpoint_s: Seconds of training between checkpoints; None for the best.
    """

    slow_nodes: float = 0.005
    slow_factor: float = 1.1
    mtbf_hours: float = 54 * 24 * 16384 / 419
    restart_s: float = 900.0
    save_s: float = 30.0
    checkpoint_s: float | None = None

    def failure_s(self, cards: int) -> float:
        """Seconds between failures of a run."""
        return self.mtbf_hours * 3600 / cards

    def interval_s(self, cards: int) -> float:
        """Seconds of training between checkpoints, as set or the best."""
        if self.checkpoint_s is not None:
            return self.checkpoint_s
        return best_interval(self.save_s, self.failure_s(cards))


def slow_factors(
    rng: np.random.Generator, faults: Faults, ranks: NDArray[np.int64], per_node: int
) -> Values:
    """Factor by which the slowest member of each group of ranks computes longer.

    Args:
        rng: Random numbers.
        faults: Share of slow nodes, and their factor.
        ranks: Rank numbers [..., members].
        per_node: Ranks of a node, filled in order.

    Returns:
        [...], 1 where no member is on a slow node.
    """
    nodes = -(-int(ranks.max() + 1) // per_node)
    factor = np.where(rng.random(nodes) < faults.slow_nodes, faults.slow_factor, 1.0)
    slowest: Values = factor[ranks // per_node].max(axis=-1)
    return slowest


def best_interval(save_s: float, failure_s: float) -> float:
    """Training time between checkpoints that loses least.

    Daly's estimate (Future Generation Computer Systems 22, 2006, equation 37), which corrects
    Young's sqrt(2 save failure) where saving takes long beside the time between failures.
    """
    if save_s == 0:
        return 0.0
    if save_s >= 2 * failure_s:
        return failure_s
    ratio = save_s / (2 * failure_s)
    return sqrt(2 * save_s * failure_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_s


def expected_goodput(interval_s: float, save_s: float, restart_s: float, failure_s: float) -> float:
    """Share of the time that a run spends on steps it keeps, on average.

    Daly's complete model (equation 20): failures come at any time, restarts included, and each
    loses what was done since the last checkpoint.
    """
    whole = failure_s * np.exp(restart_s / failure_s) * expm1((interval_s + save_s) / failure_s)
    return float(interval_s / whole)


@dataclass(frozen=True)
class Goodput:
    """A long run with failures.

    Attributes:
        share: Share of the time spent on steps that were kept; one value per run.
        saving: Share spent on checkpoints, mean.
        lost: Share spent on repeated steps, mean.
        restarting: Share spent on restarts, mean.
        failures: Failures per run, mean.
        expected: `expected_goodput`.
        interval_s: Training time between checkpoints.
    """

    share: Values
    saving: float
    lost: float
    restarting: float
    failures: float
    expected: float
    interval_s: float


def play_run(
    rng: np.random.Generator, faults: Faults, cards: int, step_s: float, days: float, runs: int
) -> Goodput:
    """Simulate whole runs, failure after failure.

    Args:
        rng: Random numbers.
        faults: The faults.
        cards: GPUs of the run.
        step_s: Time of a step, the least checkpoint interval.
        days: Length of each run.
        runs: Number of runs.
    """
    failure_s = faults.failure_s(cards)
    interval = max(faults.interval_s(cards), step_s)
    cycle = interval + faults.save_s
    length = days * 86400
    kept, saving, lost, restarting, failures = (np.zeros(runs) for _ in range(5))
    for run in range(runs):
        clock = 0.0
        while clock < length:
            # Exponential: what happened so far says nothing about the next failure.
            up = rng.exponential(failure_s)
            stays_up = min(up, length - clock)
            saved = stays_up // cycle
            kept[run] += saved * interval
            saving[run] += saved * faults.save_s
            clock += stays_up
            if clock >= length:
                # The run ends here: what it did since its last checkpoint counts as saved.
                kept[run] += min(stays_up - saved * cycle, interval)
                saving[run] += max(stays_up - saved * cycle - interval, 0.0)
                break
            failures[run] += 1
            lost[run] += stays_up - saved * cycle
            down = faults.restart_s
            while (again := rng.exponential(failure_s)) < faults.restart_s:
                # It fails while it restarts.
                failures[run] += 1
                down += again
            down = min(down, length - clock)
            restarting[run] += down
            clock += down
    return Goodput(
        share=kept / length,
        saving=float(saving.mean() / length),
        lost=float(lost.mean() / length),
        restarting=float(restarting.mean() / length),
        failures=float(failures.mean()),
        expected=expected_goodput(interval, faults.save_s, faults.restart_s, failure_s),
        interval_s=interval,
    )
