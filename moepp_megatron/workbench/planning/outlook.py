"""What a whole run takes: days, failures and checkpoints, energy, money, and their range."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, expm1, sqrt
from typing import Any

from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.measured.compare import Range
from moepp_megatron.workbench.planning.planned import Planned

# Seconds between failures of one GPU, whatever fails with it: 419 unexpected interruptions of
# 16,384 GPUs in 54 days (Llama 3, arXiv 2407.21783, table 5).
_FAILURE_S = 54 * 86400 * 16384 / 419
# From a failure to the first new step: MegaScale is back within 15 minutes (arXiv 2402.15627).
_RESTART_S = 900.0
# For which a checkpoint holds up training: assumed.
_SAVE_S = 30.0


def best_interval(save_s: float, failure_s: float) -> float:
    """Seconds of training between checkpoints that lose least (Daly 2006, equation 37)."""
    if save_s >= 2 * failure_s:
        return failure_s
    ratio = save_s / (2 * failure_s)
    return sqrt(2 * save_s * failure_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - save_s


def expected_goodput(interval_s: float, save_s: float, restart_s: float, failure_s: float) -> float:
    """Share of the time that a run spends on steps it keeps, on average (Daly 2006, equation 20).

    Failures come at any time, restarts included; each loses what came after the last checkpoint.
    """
    seconds = failure_s * exp(restart_s / failure_s) * expm1((interval_s + save_s) / failure_s)
    return interval_s / seconds


@dataclass(frozen=True)
class _Outlook:
    """A run of one model in one layout; None where power, price or published runs are unknown."""

    tokens: float
    days: float  # days of its steps
    lost_days: float  # further days: checkpoints, failures, restarts, repeated steps
    low_days: float | None  # a tenth of published runs like it took less, all days counted
    high_days: float | None  # a tenth of them took more
    gpu_hours: float  # GPU hours of all days
    energy_mwh: float | None  # energy of the GPUs at their rated power
    money: float | None  # price of the GPU hours
    lost_money: float | None  # the part of it that `lost_days` cost
    low_money: float | None
    high_money: float | None
    money_per_million: float | None  # price of a million tokens

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
) -> _Outlook:
    """The outlook of a run of `world` GPUs; `price` is that of a GPU hour."""
    days = planned.run_seconds(tokens) / 86400
    failure_s = _FAILURE_S / world
    interval = max(best_interval(_SAVE_S, failure_s), planned.step.total)
    total = days / expected_goodput(interval, _SAVE_S, _RESTART_S, failure_s)
    low, high = (None, None) if errors is None else errors.of(total)
    hours, power = 24.0 * total * world, machine.hardware.power_watts
    money, lost, low_money, high_money = (
        None if price is None or count is None else count * 24.0 * world * price
        for count in (total, total - days, low, high)
    )
    energy = None if power is None else hours * power / 1e6
    per_million = None if money is None else money / (tokens / 1e6)
    taken, prices = (days, total - days, low, high), (money, lost, low_money, high_money)
    return _Outlook(tokens, *taken, hours, energy, *prices, per_million)
