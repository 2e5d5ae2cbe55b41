"""What a whole run takes: days, failures and checkpoints, energy, money, and their range."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, expm1, sqrt
from typing import Any

from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.measured.published import Range
from moepp_megatron.workbench.planning.planned import Planned

# Seconds between failures of one GPU, whatever fails with it: 419 unexpected interruptions of
# 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, table 5).
_FAILURE_S = 54 * 86400 * 16384 / 419
# From a failure to the first new step: MegaScale is back within 15 minutes (arXiv 2402.15627).
_RESTART_S = 900.0
# For which a checkpoint holds up training: assumed.
_SAVE_S = 30.0


def best_interval(save_s: float, failure_s: float) -> float:
    """Training time between checkpoints that loses least, seconds.

    Daly's estimate (Future Generation Computer Systems 22, 2006, equation 37), which corrects
    Young's sqrt(2 save failure) where saving takes long beside the time between failures.
    """
    if save_s >= 2 * failure_s:
        return failure_s
    ratio = save_s / (2 * failure_s)
    return sqrt(2 * save_s * failure_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_s


def expected_goodput(interval_s: float, save_s: float, restart_s: float, failure_s: float) -> float:
    """Share of the time that a run spends on steps it keeps, on average.

    Daly's complete model (equation 20): failures come at any time, restarts included, and each
    loses what was done since the last checkpoint.
    """
    whole = failure_s * exp(restart_s / failure_s) * expm1((interval_s + save_s) / failure_s)
    return interval_s / whole


@dataclass(frozen=True)
class Outlook:
    """A run of one model in one layout.

    Attributes:
        tokens: Tokens of the run.
        days: Days of its steps alone.
        lost_days: Further days: checkpoints, failures, restarts, repeated steps.
        low_days: A tenth of published runs like it took less, in units of their estimate; all
            days. None where there is nothing to compare with.
        high_days: A tenth of them took more.
        gpu_hours: GPU hours of all days.
        energy_mwh: Energy of the GPUs at their rated power; None where that is not known.
        money: Price of the GPU hours; None without a price.
        lost_money: The part of it that `lost_days` cost.
        low_money: Price of `low_days`.
        high_money: Price of `high_days`.
        money_per_million: Price of a million tokens.
    """

    tokens: float
    days: float
    lost_days: float
    low_days: float | None
    high_days: float | None
    gpu_hours: float
    energy_mwh: float | None
    money: float | None
    lost_money: float | None
    low_money: float | None
    high_money: float | None
    money_per_million: float | None

    @property
    def all_days(self) -> float:
        """Days from start to end."""
        return self.days + self.lost_days

    def record(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def outlook_of(
    planned: Planned,
    world: int,
    machine: Machine,
    tokens: float,
    price: float | None,
    errors: Range | None,
) -> Outlook:
    """The outlook of a run, with the failures and checkpoints that are assumed above.

    Args:
        planned: The model in its layout.
        world: GPUs.
        machine: Their kind.
        tokens: Tokens to train on.
        price: Price of a GPU hour.
        errors: How far estimates like this one were off.
    """
    days = planned.run_seconds(tokens) / 86400
    failure_s = _FAILURE_S / world
    interval = max(best_interval(_SAVE_S, failure_s), planned.step.total)
    useful = expected_goodput(interval, _SAVE_S, _RESTART_S, failure_s)
    total = days / useful
    money_per_day = None if price is None else 24.0 * world * price

    def cost(count: float | None) -> float | None:
        return None if money_per_day is None or count is None else count * money_per_day

    low, high = (None, None) if errors is None else errors.of(total)
    money, power = cost(total), machine.hardware.power_watts
    return Outlook(
        tokens=tokens,
        days=days,
        lost_days=total - days,
        low_days=low,
        high_days=high,
        gpu_hours=24.0 * total * world,
        energy_mwh=None if power is None else 24.0 * total * world * power / 1e6,
        money=money,
        lost_money=cost(total - days),
        low_money=cost(low),
        high_money=cost(high),
        money_per_million=None if money is None else money / (tokens / 1e6),
    )
