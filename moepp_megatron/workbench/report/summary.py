"""The numbers of a run that the page shows, computed from its records."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.workbench.report.run_data import RunData

# Share of the records that counts as the settled end of a run. Every share and every saving that a
# page, a summary or the last lines of `moepp train` name is a mean over these records.
_TAIL = 0.1


@dataclass(frozen=True)
class RunSummary:
    """Numbers of a whole run. "Settled" is the mean over the last tenth of the records.

    Attributes:
        loss: Training loss of the last record, nats.
        settled_loss: Training loss, settled, nats.
        valid_loss: Last validation loss, nats; None if never evaluated.
        valid_step: Step of ``valid_loss``.
        perplexity: ``exp`` of the validation loss, or of ``settled_loss`` without one.
        ffn_fraction: FFN share, mean over the steps of the run; used only for totals of the run.
        settled_ffn_fraction: FFN share, settled.
        settled_count: Number of records that count as settled.
        window: The steps of these records in words.
        tokens_per_s: Median over the records.
        train_seconds: Time in training steps, without start, evaluation and checkpoints.
        a2a_bytes: All-to-all bytes of the whole run.
        settled_a2a_bytes: All-to-all bytes of a step, settled.
        dropped_fraction: Share of selections dropped, settled.
    """

    last_step: int
    tokens: int
    loss: float
    settled_loss: float
    valid_loss: float | None
    valid_step: int | None
    perplexity: float
    phi: float
    ffn_fraction: float
    settled_ffn_fraction: float
    settled_count: int
    window: str
    tokens_per_s: float
    train_seconds: float
    a2a_bytes: float
    settled_a2a_bytes: float
    dropped_fraction: float


def step_weights(records: Sequence[StepMetrics]) -> list[int]:
    """Number of steps that each record represents: those since the record before it."""
    steps = [0, *(record.step for record in records)]
    return [max(1, after - before) for before, after in zip(steps, steps[1:], strict=False)]


def tail(records: Sequence[StepMetrics]) -> Sequence[StepMetrics]:
    """The last tenth of the records, at least one."""
    return records[-max(1, round(len(records) * _TAIL)) :]


def window(records: Sequence[StepMetrics]) -> str:
    """The steps of these records, as "steps 109 to 120" or "step 120"."""
    first, last = records[0].step, records[-1].step
    return f"step {last:,}" if first == last else f"steps {first:,} to {last:,}"


def finite_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Weighted mean of the finite values; NaN if there is none."""
    pairs = [
        (value, weight)
        for value, weight in zip(values, weights or [1.0] * len(values), strict=True)
        if math.isfinite(value)
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else math.nan


def summarize(run: RunData) -> RunSummary:
    """Computes a run's numbers."""
    records = run.records
    weights = step_weights(records)
    settled = tail(records)

    def run_mean(value: Callable[[StepMetrics], float]) -> float:
        return finite_mean([value(r) for r in records], [float(w) for w in weights])

    evaluated = [(r.step, r.valid_loss) for r in records if r.valid_loss is not None]
    valid_step, valid_loss = evaluated[-1] if evaluated else (None, None)
    settled_loss = finite_mean([r.loss for r in settled])
    return RunSummary(
        last_step=records[-1].step,
        tokens=records[-1].tokens,
        loss=records[-1].loss,
        settled_loss=settled_loss,
        valid_loss=valid_loss,
        valid_step=valid_step,
        perplexity=_perplexity(settled_loss if valid_loss is None else valid_loss),
        phi=run.config.phi,
        ffn_fraction=run_mean(lambda r: r.ffn_fraction),
        settled_ffn_fraction=finite_mean([r.ffn_fraction for r in settled]),
        settled_count=len(settled),
        window=window(settled),
        tokens_per_s=median([r.tokens_per_s for r in records]),
        train_seconds=run_mean(lambda r: r.step_time_s) * sum(weights),
        a2a_bytes=run_mean(lambda r: float(r.a2a_bytes)) * sum(weights),
        settled_a2a_bytes=finite_mean([float(r.a2a_bytes) for r in settled]),
        dropped_fraction=finite_mean([r.dropped_fraction for r in settled]),
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
