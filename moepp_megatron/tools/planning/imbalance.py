"""Uneven routing as a distribution: the load of the fullest rank and of the fullest expert.

Each layer's popularity of FFN experts is a draw from a symmetric Dirichlet distribution, the
selections of a micro-batch a multinomial draw from it. With evenness `a` the popularity of one of F
experts has the coefficient of variation sqrt((F - 1) / (F a + 1)): large `a` is even. All ranks of
an expert-parallel group wait for the fullest, in every layer: the mean of the maxima counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from moepp_megatron.config import ConfigError
from moepp_megatron.file_names import METRICS_FILE
from moepp_megatron.observe.metrics import MetricsError, Records, StepMetrics, read_metrics

# Draws of a layer: their mean is then known to well below a percent of the mean load.
_DRAWS, _SEED = 400, 20241009
# A multinomial draw beyond this is as even as one of this size, at a thousandth of its time.
_MOST_SELECTIONS = 2**40


@dataclass(frozen=True)
class AssumedRouting:
    """Unevenness of the routing."""

    evenness: float | None  # `a` of the distribution; None where it is forced to balance


FORCED_BALANCE = AssumedRouting(None)
# What a balance loss reaches after 200B tokens: the fullest of 64 experts takes 1.52 times the mean
# (arXiv 2408.15664, table 2, the larger model: MaxVio 0.52). The quickstart model is at an evenness
# of 8 in the last quarter of its first 1.6M tokens here (docs/planning.md).
LEARNED = AssumedRouting(26.0)

# Evenness times experts in the first hundred steps: 128 experts at 2 explain why Qwen3-30B takes
# 1.23 times as long with its own routing as with routing forced to balance. Not carried beyond
# the 8 to 128 experts of the two runs that there are.
_EARLY_CONCENTRATION, _LEAST_EVEN = 256.0, 2.0


def early(num_experts: int) -> AssumedRouting:
    """Routing of a run's first hundred steps, in which most published runs were timed."""
    evenness = min(_EARLY_CONCENTRATION / num_experts, LEARNED.evenness or 0.0)
    return AssumedRouting(max(evenness, _LEAST_EVEN))


@dataclass(frozen=True)
class Load:
    """Maximum over mean, over layers and micro-batches."""

    mean: float  # the factor on the time of experts and of their exchange
    median: float
    p90: float
    p99: float


EVEN = Load(1.0, 1.0, 1.0, 1.0)


@lru_cache(maxsize=4096)
def rank_load(routing: AssumedRouting, num_experts: int, ranks: int, selections: int) -> Load:
    """Rows of the fullest of `ranks` ranks over the mean; `ranks` divides the FFN experts.

    `selections` are the FFN selections of the group's tokens in one layer and micro-batch.
    """
    if routing.evenness is None or ranks == 1 or selections == 0:
        return EVEN
    rng = np.random.default_rng(_SEED)
    popularity = rng.dirichlet(np.full(num_experts, routing.evenness), size=_DRAWS)
    # Rounding must not push a row's sum above 1.
    popularity /= popularity.sum(axis=1, keepdims=True)
    per_rank = popularity.reshape(_DRAWS, ranks, -1).sum(axis=2)
    counts = rng.multinomial(min(selections, _MOST_SELECTIONS), per_rank / per_rank.sum(1)[:, None])
    ratios = counts.max(axis=1) * ranks / counts.sum(axis=1)
    median, p90, p99 = np.quantile(ratios, (0.5, 0.9, 0.99))
    return Load(float(ratios.mean()), float(median), float(p90), float(p99))


def evenness_of(shares: Sequence[Sequence[float]] | np.ndarray, selections: int) -> float:
    """The evenness that explains how uneven layers' shares of FFN experts are, by moments.

    The mean square of the relative deviation, less what the chance of `selections` draws adds.

    Raises:
        ValueError: There is no layer, or one without selections.
    """
    values = np.asarray(shares, dtype=float)
    if not len(values):
        raise ValueError("shares must hold at least one layer")
    if (values.sum(axis=1) <= 0).any():
        raise ValueError("a layer's shares of FFN experts must not all be 0")
    experts = values.shape[1]
    relative = values / values.mean(axis=1, keepdims=True)
    chance = (experts - 1) / selections
    variation = float(np.maximum(relative.var(axis=1) - chance, 0.0).mean())
    if variation == 0.0:
        return float("inf")
    return max(((experts - 1) / variation - 1) / experts, 1e-3)


def recorded_routing(source: Path, num_ffn_experts: int, topk: int) -> AssumedRouting:
    """Routing as uneven as in the second half of a run, given as its folder or `metrics.jsonl`.

    Raises:
        ConfigError: There is no such file, or it has no shares of this many experts.
    """
    late = _late_steps(source, num_ffn_experts)
    first, last = late[0], late[-1]
    # Tokens are counted from the start of the run.
    per_step = (last.tokens - first.tokens) / max(last.step - first.step, 1)
    selections = max(round(per_step * topk * last.ffn_fraction), 1)
    shares = array("d")
    for record in late:
        for layer in record.layer_expert_share or ():
            shares.extend(layer[:num_ffn_experts])
    evenness = evenness_of(np.asarray(shares).reshape(-1, num_ffn_experts), selections)
    return AssumedRouting(evenness if evenness != float("inf") else None)


def _late_steps(source: Path, num_ffn_experts: int) -> Records:
    """Records of the second half of a run that hold shares."""
    try:
        records = read_metrics(source / METRICS_FILE if source.is_dir() else source)
    except MetricsError as error:
        raise ConfigError(
            f"--routing ({source}) must be a run or a metrics.jsonl ({error}); name one"
        ) from None
    steps = np.flatnonzero([_shows(record, num_ffn_experts) for record in records])
    if len(steps) < 2:
        raise ConfigError(
            f"--routing ({source}) must hold layer_expert_share of at least 2 steps with "
            f"{num_ffn_experts} FFN experts; name a run of this model's experts"
        )
    late: Records = records[steps[len(steps) // 2 :]]
    return late


def _shows(record: StepMetrics, num_ffn_experts: int) -> bool:
    shares = [layer[:num_ffn_experts] for layer in record.layer_expert_share or ()]
    return bool(shares) and all(len(of) == num_ffn_experts and sum(of) > 0 for of in shares)
