"""The numbers of a run that the page shows, computed from its records."""

import math
from dataclasses import dataclass

import numpy as np

from moepp_megatron.observe.metrics import Records
from moepp_megatron.tools.report.run_data import RunData

# Share of the records that is the tail of a run. Every share and every saving that a
# page, a summary or the last lines of `moepp train` name is a mean over these records.
_TAIL = 0.1


@dataclass(frozen=True)
class RunSummary:
    """Numbers of a whole run; those of its tail are means over the last tenth of the records."""

    last_step: int
    tokens: int
    loss: float  # training loss of the last record, nats
    tail_loss: float  # training loss of the tail, nats
    valid_loss: float | None  # the last, nats; None if never evaluated
    valid_step: int | None
    perplexity: float  # `exp` of the validation loss, or of `tail_loss` without one
    phi: float
    ffn_fraction: float  # mean over the steps of the run; used only for totals of the run
    tail_ffn_fraction: float
    tail_count: int  # records of the tail
    window: str  # the steps of these records in words
    tokens_per_s: float  # median over the records
    train_seconds: float  # in training steps, without start, evaluation and checkpoints
    a2a_bytes: float  # of the whole run
    dropped_fraction: float  # share of selections dropped in the tail


def step_weights(steps: np.ndarray) -> np.ndarray:
    """[n] number of steps that each record represents: those since the record before it."""
    return np.maximum(1, np.diff(steps, prepend=0))


def tail[Rows: (Records, np.ndarray)](rows: Rows) -> Rows:
    """The last tenth of the records, or of what each of them has, at least one."""
    return rows[-max(1, round(len(rows) * _TAIL)) :]


def window(run: RunData) -> str:
    """The steps of the last tenth of the records, as "steps 109 to 120" or "step 120"."""
    first, last = tail(run.records.steps)[[0, -1]]
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"


def finite_mean(values: np.ndarray, weights: np.ndarray | float = 1.0) -> float:
    """Weighted mean of the finite values, [n]; NaN if there is none."""
    known = np.isfinite(values)
    total = float(np.broadcast_to(weights, known.shape)[known].sum())
    # Python's sum is exact where a plain one of a million numbers is not.
    return sum(map(float, (values * weights)[known])) / total if total else math.nan


def summarize(run: RunData) -> RunSummary:
    """Computes a run's numbers."""
    last, values = run.records[-1], run.numbers.values
    weights = step_weights(run.records.steps)
    evaluated = run.numbers.series("valid_loss")
    has_valid = len(evaluated.x) > 0
    valid_step = int(evaluated.x[-1]) if has_valid else None
    valid_loss = float(evaluated.y[-1]) if has_valid else None
    tail_loss = finite_mean(tail(values("loss")))
    return RunSummary(
        last_step=last.step,
        tokens=last.tokens,
        loss=last.loss,
        tail_loss=tail_loss,
        valid_loss=valid_loss,
        valid_step=valid_step,
        perplexity=_perplexity(tail_loss if valid_loss is None else valid_loss),
        phi=run.config.phi,
        ffn_fraction=finite_mean(values("ffn_fraction"), weights),
        tail_ffn_fraction=finite_mean(tail(values("ffn_fraction"))),
        tail_count=len(tail(weights)),
        window=window(run),
        tokens_per_s=float(np.median(values("tokens_per_s"))),
        train_seconds=finite_mean(values("step_time_s"), weights) * float(weights.sum()),
        a2a_bytes=finite_mean(values("a2a_bytes"), weights) * float(weights.sum()),
        dropped_fraction=finite_mean(tail(values("dropped_fraction"))),
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
