"""Controllers that hold the mean number of FFN experts per token at a target.

The *share* is the FFN experts' part of all selections; a token takes share x K of them. Balance
under a weight tau gives the share phi = tau F / (tau F + Z). Solved for tau:

    log tau = logit(share) - log(F / Z)

So tau follows from the target share (feed-forward). Real training differs from perfect balance, so
a controller corrects it by feedback:

- **bias** moves the FFN experts' selection bias, by one of two rules. Without a gain the margins of
  a step's selections (`margins`) say which bias would have given the target, and the bias moves a
  part of the way there (`BudgetController`): nothing depends on the scale of scores, the number of
  experts or the batch. With a gain it moves by LongCat-Flash's rule (`_bias_step`).
- **tau** adds the error of the measured share, in log odds, to log tau (proportional part; in log
  odds the equation above is linear), and a hundredth of it per step to a running sum (integral
  part). Routers follow tau with a delay of many steps, so only an integral part would oscillate.

The state is a few numbers a layer that follow from counts over the global batch: the same on
every rank and in every layout.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import OUT_OF_REACH, quantile

Controller = Literal["none", "bias", "tau"]

# Beyond these the balance loss is all zero-computation experts or none of them.
_LEAST_TAU, _MOST_TAU = 0.01, 100.0
# The past's part of the tau controller's gain, a step.
_INTEGRAL = 0.01
# Log odds of 0 and 1 are infinite; a share nearer to them than this counts as this far.
_EDGE = 1e-3


@dataclass(frozen=True)
class Budget:
    """Target of a model's FFN share, and how it is reached.

    Attributes:
        share: FFN share of all selections.
        gain: Change of the bias per step and missing share, or of log tau per missing unit of
            log odds; None with `bias` where `response` acts.
        response: Part of the missing bias that is added after a step.
        drift: The newest step's weight in the drift that corrects `response`; 0 for no correction.
        decay: Weight of the past in the measured share's moving average.
        per_layer: True to control each layer, False for their mean.
        start_share: Share at the start; None for a constant share.
        ramp_begin: Steps during which the share is `start_share`.
        ramp_steps: Steps in which it then changes linearly to `share`.
    """

    share: float
    controller: Controller = "none"
    gain: float | None = None
    response: float = 0.7
    drift: float = 0.4
    decay: float = 0.9
    per_layer: bool = True
    start_share: float | None = None
    ramp_begin: int = 0
    ramp_steps: int = 0

    def share_at(self, step: int) -> float:
        """The target share in `step`, counted from 1."""
        if self.start_share is None:
            return self.share
        steps_on_ramp = max(0, step - 1 - self.ramp_begin)
        if step > self.ramp_begin and steps_on_ramp >= self.ramp_steps:
            return self.share
        way = steps_on_ramp / self.ramp_steps if self.ramp_steps > 0 else 0.0
        return self.start_share + way * (self.share - self.start_share)


def _inside(share: float) -> float:
    return min(max(share, _EDGE), 1.0 - _EDGE)


def _log_odds(share: float) -> float:
    share = _inside(share)
    return math.log(share / (1.0 - share))


class BudgetController:
    """Controller that keeps MoE layers at a budget; `state` resumes an earlier one."""

    def __init__(
        self,
        budget: Budget,
        config: MoEPPConfig,
        num_layers: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.budget = budget
        self._config = config
        state = state or {}
        self._shares: Tensor | None = None
        if state.get("shares") is not None:
            self._shares = torch.tensor(state["shares"], dtype=torch.float64)
        self._missing: list[float] = list(state.get("missing") or [0.0] * num_layers)
        self._integral: list[float] = list(state.get("past") or [0.0] * num_layers)
        # Of the measured bias: what a step moves it by, and what it lacked after the last step.
        self._drift: list[float] = list(state.get("drift") or [0.0] * num_layers)
        self._lacking: list[float | None] = list(state.get("lacking") or [None] * num_layers)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: plain numbers, copies that later steps do not change."""
        return {
            "shares": None if self._shares is None else self._shares.tolist(),
            "missing": list(self._missing),
            "past": list(self._integral),
            "drift": list(self._drift),
            "lacking": list(self._lacking),
        }

    @property
    def needs_margins(self) -> bool:
        """True if `observe` needs the margins of a step."""
        return self.budget.controller == "bias" and self.budget.gain is None

    def taus(self, step: int) -> list[float]:
        """Tau of each MoE layer in `step`."""
        base = self._config.tau_for(_inside(self.budget.share_at(step)))
        pulls = [
            (self.budget.gain or 1.0) * (missing + integral)
            for missing, integral in zip(self._missing, self._integral, strict=True)
        ]
        return [min(max(base * math.exp(pull), _LEAST_TAU), _MOST_TAU) for pull in pulls]

    def observe(
        self, selected_LE: Tensor, step: int, margins_LB: Tensor | None = None
    ) -> Tensor | None:
        """Learn from a step; returns [MoE layers, E] fp32 to add to the biases, None without any.

        `selected_LE` are selections over the global batch, `margins_LB` the margins of
        `margins.count_margins`, if `needs_margins`.
        """
        if self.needs_margins:
            assert margins_LB is not None, "without a gain the bias controller needs margins"
            return self._measured_steps(selected_LE, margins_LB, step)
        shares = selected_LE.double() / selected_LE.sum(dim=1, keepdim=True)
        average = shares if self._shares is None else self._shares
        self._shares = self.budget.decay * average + (1.0 - self.budget.decay) * shares
        measured = self._shares
        if not self.budget.per_layer:
            measured = measured.mean(dim=0, keepdim=True).expand_as(measured)
        wanted = self.budget.share_at(step)
        match self.budget.controller:
            case "bias":
                assert self.budget.gain is not None, "LongCat-Flash's rule has a gain"
                return _bias_step(measured, wanted, self._config.num_ffn_experts, self.budget.gain)
            case "tau":
                self._turn_tau(measured, wanted, step)
            case "none":
                pass
            case other:
                assert_never(other)
        return None

    def _measured_steps(self, selected_LE: Tensor, margins_LB: Tensor, step: int) -> Tensor:
        """[MoE layers, E] fp32: moving average of the bias that steps lacked, ahead by its lag."""
        steps_LE = torch.zeros(selected_LE.shape)
        selections_L = selected_LE.sum(dim=1)
        if not self.budget.per_layer:
            margins_LB = margins_LB.sum(dim=0, keepdim=True).expand_as(margins_LB)
            selections_L = selections_L.sum().expand_as(selections_L)
        for layer, selections in enumerate(selections_L.tolist()):
            if selections > 0:
                now, ahead = (
                    quantile(margins_LB[layer].tolist(), self.budget.share_at(at) * selections)
                    for at in (step, step + 1)
                )
                moved = self._measured_step(layer, now, ahead)
                steps_LE[layer, : self._config.num_ffn_experts] = moved
        return steps_LE

    def _measured_step(self, layer: int, now: float, ahead: float) -> float:
        """A layer's step from what the bias lacks for the last target and the next one."""
        response, drift, lacking = self.budget.response, self._drift[layer], self._lacking[layer]
        if lacking is not None and abs(now) < OUT_OF_REACH:
            # The bias needed in this step less the one needed in the step before.
            self._drift[layer] += self.budget.drift * response * (now - lacking - drift)
        # An average of what moves by d a step is d / response after the next step. So the bias is
        # the average and so much of the drift; what is added keeps it that.
        change = (self._drift[layer] - drift) / response
        moved = response * ahead + drift + change
        self._lacking[layer] = ahead - moved if abs(ahead) < OUT_OF_REACH else None
        return moved

    def _turn_tau(self, measured: Tensor, wanted: float, step: int) -> None:
        ffn_shares = measured[:, : self._config.num_ffn_experts].sum(dim=1).tolist()
        for layer, (share, tau) in enumerate(zip(ffn_shares, self.taus(step), strict=True)):
            missing = _log_odds(wanted) - _log_odds(share)
            self._missing[layer] = missing
            # At its end tau cannot follow; what would be added there had to be undone later.
            if (missing > 0 and tau < _MOST_TAU) or (missing < 0 and tau > _LEAST_TAU):
                self._integral[layer] += _INTEGRAL * missing


def _bias_step(shares_LE: Tensor, wanted: float, num_ffn_experts: int, rate: float) -> Tensor:
    """[L, E] `delta b_i = mu (K_e/K * 1/F - T_i / (K T_all))` on FFN experts, 0 on the others."""
    # LongCat-Flash (arXiv 2509.01322); `shares_LE` are T_i / (K T_all), `wanted` K_e/K, `rate` mu.
    step_LE = torch.zeros(shares_LE.shape)
    ffn = slice(0, num_ffn_experts)
    step_LE[:, ffn] = (rate * (wanted / num_ffn_experts - shares_LE[:, ffn])).float()
    return step_LE
