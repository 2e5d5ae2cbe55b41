"""What a whole run takes: days, failures and checkpoints, energy, money, and their range."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.measured.published import Range
from moepp_megatron.workbench.planning.planned import Planned
from moepp_megatron.workbench.planning.simulation.faults import Faults, expected_goodput


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
    """The outlook of a run, with failures and checkpoints as `moepp plan --simulate` assumes them.

    Args:
        planned: The model in its layout.
        world: GPUs.
        machine: Their kind.
        tokens: Tokens to train on.
        price: Price of a GPU hour.
        errors: How far estimates like this one were off.
    """
    faults = Faults()
    days = planned.run_seconds(tokens) / 86400
    failure_s = faults.failure_s(world)
    interval = max(faults.interval_s(world), planned.step.total)
    useful = expected_goodput(interval, faults.save_s, faults.restart_s, failure_s)
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
