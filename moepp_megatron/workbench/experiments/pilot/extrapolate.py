"""The same models at the target's size and on its GPUs, by the cost model.

Speed is extrapolated, learning is not: short runs of a small model do not show the loss gap of a
large one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moepp_megatron.config import Config, ConfigError, with_overrides
from moepp_megatron.config.vanilla import vanilla, without_budget
from moepp_megatron.workbench.experiments.pilot.arms import with_tau
from moepp_megatron.workbench.experiments.pilot.result import (
    Arm,
    ArmOutcome,
    PilotTarget,
    TargetModel,
)
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun
from moepp_megatron.workbench.planning.imbalance import LEARNED, AssumedRouting
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.plan import best_layouts, check_formats
from moepp_megatron.workbench.planning.planned import Planned
from moepp_megatron.workbench.planning.recorded_routing import recorded_routing

# Median error of the published runs of docs/planning.md that set no number. The ratio of two models
# on one machine ought to be steadier than either of them, but nothing here proves by how much.
COST_MODEL_ERROR = 0.08
# A share of exactly 0 or 1 has no log odds.
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True)
class TargetRequest:
    """The target of the extrapolation.

    Attributes:
        name: Name of the configuration.
        config: Its model, batch and formats; its own layout does not matter.
        gpus: Number of GPUs.
        machine: The kind of GPU.
        tokens: Tokens to train on.
        price_per_hour: Price of a GPU per hour.
    """

    name: str
    config: Config
    gpus: int
    machine: Machine
    tokens: float
    price_per_hour: float | None = None

    def check(self) -> None:
        """Refuse a target that cannot be planned.

        Raises:
            ConfigError: If it is vanilla, the GPU lacks its format, or nothing fits.
        """
        if self.config.moe.num_zero_computation_experts == 0:
            raise ConfigError(
                "--target (its moe section) must have zero-computation experts, because it is set "
                "beside vanilla; add some to it"
            )
        check_formats(self.config, self.machine)
        for planned in best_layouts(self.config, self.gpus, self.machine, LEARNED):
            if planned.fits:
                return
        raise ConfigError(
            f"--gpus ({self.gpus}) must be enough for a legal layout of --target that fits; use "
            "more GPUs, a number that divides the batch, or a GPU with more memory"
        )

    def extrapolate(
        self,
        arms: Sequence[ArmOutcome],
        nominal: Mapping[str, float],
        routing: Mapping[str, AssumedRouting] | None,
    ) -> PilotTarget:
        """Vanilla and every MoE++ arm at the target's size, each in its best layout.

        Args:
            arms: Measured arms of the pilot, vanilla first.
            nominal: Phi of the pilot configuration, by MoE++ arm.
            routing: Unevenness of the routing by arm; None assumes that after long training.
        """
        found = []
        for outcome in arms:
            name = outcome.arm.name
            config = self.config_of(outcome.arm, outcome.ffn_share.mean, nominal.get(name, 1.0))
            if config is not None:
                found.append(self._model(name, config, routing[name] if routing else LEARNED))
        baseline = found[0].step_time_s
        return PilotTarget(
            name=self.name,
            gpus=self.gpus,
            gpu=self.machine.hardware.name,
            tokens=self.tokens,
            price_per_hour=self.price_per_hour,
            models=[_beside(model, baseline) for model in found],
        )

    def _model(self, arm: str, config: Config, routing: AssumedRouting) -> TargetModel:
        best = best_layouts(config, self.gpus, self.machine, routing)
        if not best:
            return TargetModel(arm=arm, layout="none is legal", fits=False)
        planned = best[0]
        if not planned.fits:
            return TargetModel(arm=arm, layout=_words(planned), fits=False)
        hours = planned.run_seconds(self.tokens) / 3600
        price = self.price_per_hour
        return TargetModel(
            arm=arm,
            layout=_words(planned),
            fits=True,
            step_time_s=planned.step.total,
            tokens_per_s_per_gpu=planned.tokens_per_s_per_gpu,
            tflops_per_gpu=planned.tflops_per_gpu,
            a2a_bytes=planned.step.exchange_bytes,
            hours=hours,
            money=None if price is None else hours * self.gpus * price,
        )

    def config_of(self, arm: Arm, share: float, nominal: float) -> Config | None:
        """The target's version of an arm; None where it has none.

        Args:
            arm: Arm of the pilot.
            share: Its measured FFN share.
            nominal: phi of its pilot configuration; 1 for vanilla.
        """
        if arm.kind == "vanilla":
            return vanilla(self.config)
        if arm.kind != "moepp":
            return None
        assert arm.tau is not None, "MoE++ arms have a tau"
        config, _ = with_tau(self.config, arm.tau)
        return with_share(config, carried_share(share, nominal, config.moe.ffn_share))


def carried_share(measured: float, nominal: float, target: float) -> float:
    """The FFN share to expect of the target, from the pilot's measured share and its phi.

    With the same numbers of experts it is the measured one. Otherwise the target misses its own
    phi by as much as the pilot has missed its, in log odds.
    """
    odds = _log_odds(measured) + _log_odds(target) - _log_odds(nominal)
    return _clipped(1.0 / (1.0 + math.exp(-odds)))


def with_share(config: Config, share: float) -> Config:
    """The same model for planning with this FFN share."""
    moe = config.moe
    overrides = [
        # Planning counts the budget's share; capacities and the controller do not matter to it.
        "moe.capacity_factor=null",
        "moe.budget.controller=none",
        f"moe.budget.target_ffn_per_token={share * moe.router_topk!r}",
    ]
    if moe.balance_coeff == 0.0:
        overrides.append("moe.balance_coeff=0.01")
    return with_overrides(without_budget(config), overrides)


def measured_routing(runs: Sequence[PilotRun], target: Config) -> AssumedRouting | None:
    """Routing as uneven as in the second half of these runs, their median.

    None if it does not apply to the target, which has another number of FFN experts, or if runs
    do not record it.
    """
    found = []
    for run in runs:
        moe = run.config.moe
        if moe.num_ffn_experts != target.moe.num_ffn_experts:
            return None
        try:
            routing = recorded_routing(run.config.run.dir, moe.num_ffn_experts, moe.router_topk)
        except ConfigError:
            return None
        found.append(math.inf if routing.evenness is None else routing.evenness)
    median = statistics.median(found) if found else math.inf
    return None if math.isinf(median) else AssumedRouting(median)


def _beside(model: TargetModel, baseline: float | None) -> TargetModel:
    if model.step_time_s is None or baseline is None:
        return model
    return model.model_copy(update={"time_ratio": model.step_time_s / baseline})


def _words(planned: Planned) -> str:
    grid = planned.grid
    words = " ".join(grid.splits) or "data parallel"
    return f"{words}, micro-batch {grid.micro_batch}"


def _log_odds(share: float) -> float:
    share = _clipped(share)
    return math.log(share / (1.0 - share))


def _clipped(share: float) -> float:
    return min(max(share, _SMALLEST_SHARE), 1.0 - _SMALLEST_SHARE)
