"""Detects shifts of the data, step by step, by the use of the experts and by the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.course import Row, forecast
from moepp_megatron.observe.cusum import QUIET, Cusum, limit_for, steps_of_chance
from moepp_megatron.observe.shift_reading import (
    Cause,
    ShiftFinding,
    ShiftReading,
    Step,
    square_roots,
)
from moepp_megatron.observe.usage_noise import LossNoise, UsageNoise, least_steps

# Evidence over its limit from which steps are not learnt from until they prove to be usual.
_SUSPECT = 0.75
# Evidence, in standard deviations, from which one of loss and routing confirms an alarm of the
# other: chance alone gives as much once in some hundred steps.
_CONFIRMS = 2.5
# Spreads from which a single step is not learnt from.
_ODD = 4.0
# Steps without an alarm after which suspect ones are learnt from all the same.
_PATIENCE = 15
# Routers change their experts by themselves, above all in the first hundreds of steps: without
# the loss so many times the evidence is needed.
_ROUTING_ALONE = 2.5
# Steps that make a line, at least.
_FEWEST = 12


class ShiftMonitor:
    """Judges one step after the other.

    Each step's shares (their square roots, whose noise does not depend on them: Hellinger) and its
    loss are compared with the forecast of a line through the newest steps without a shift, so that
    what training changes slowly is no shift. How far they are from it, in spreads that
    `UsageNoise` and `LossNoise` learn from the run itself, adds up in a CUSUM each.

    While there is evidence, steps are kept apart: they join what is usual if the evidence goes
    away, or if it has lasted for `memory` steps; then the new data is what is usual.

    Args:
        settings: Settings of the configuration.
        reference: [L, E] counts of another run to compare with instead of a line; None for none.
        noise: Initial noise, from the run of `reference`.
    """

    def __init__(
        self,
        settings: ShiftSection,
        reference: NDArray[np.int64] | None = None,
        noise: UsageNoise | None = None,
    ) -> None:
        self._settings = settings
        self._given = None if reference is None else square_roots(reference).ravel()
        self._fixed = self._given
        self._span = max(settings.span * settings.window, _FEWEST)
        self._lag = settings.lag * settings.window
        limit = self._limit = settings.threshold or limit_for(settings.false_alarm_steps)
        self._cusums = [Cusum(limit * _ROUTING_ALONE), *(Cusum(limit) for _ in range(3))]
        self._routing, self._rise, self._fall, self._mixed = self._cusums
        self._noise = UsageNoise(settings) if noise is None else noise
        self._loss_noises = [LossNoise(settings) for _ in range(2)]
        self._usual: list[Step] = []
        self._apart: list[Step] = []
        # Whether there has been an alarm while they are apart.
        self._is_shift = False
        self._num_steps = 0
        self._reading: ShiftReading | None = None

    @property
    def noise(self) -> UsageNoise:
        """Differences of usual steps from their forecasts; unknown while the reference is fixed."""
        return self._noise if self._fixed is None else UsageNoise(self._settings)

    def add(
        self, experts: NDArray[np.int64], loss: float, spread: float = math.nan
    ) -> ShiftReading | None:
        """Judge a step and learn from it.

        Args:
            experts: [L, E] selections of each expert over all ranks.
            loss: Language-model loss over all ranks, nats; NaN where there is none.
            spread: Standard deviation of the sequences' losses; NaN likewise.

        Returns:
            None until there is enough to compare with.
        """
        self._num_steps += 1
        totals = experts.sum(axis=1).astype(np.float64)
        losses = np.array([loss, math.log(spread) if spread > 0 else math.nan])
        step = Step(self._num_steps, square_roots(experts).ravel(), totals, losses)
        found = self._compared(step)
        if found is None:
            self._usual = [*self._usual, step][-self._span - self._lag :]
            return None
        difference, log_distance, residuals = found
        self._reading = self._judge(log_distance, residuals)
        evidence = max(cusum.over_limit for cusum in self._cusums)
        self._is_shift = self._is_shift or evidence > 1.0
        if evidence > _SUSPECT or self._is_odd(log_distance, residuals):
            # Bounded, because with a fixed reference a shift may last for ever.
            self._apart = [*self._apart, step][-least_steps(self._settings) :]
            if not self._is_shift and len(self._apart) >= _PATIENCE:
                self._return()
            elif len(self._apart) >= least_steps(self._settings) and self._fixed is None:
                self._accept()
        else:
            self._return()
            self._learn(step, difference, log_distance, residuals)
        return self._reading

    def explain(self) -> ShiftFinding | None:
        """What has moved; None where no step is suspect."""
        if self._reading is None or not self._apart:
            return None
        shape = len(self._apart[0].totals), -1
        forecasts = [self._roots(step)[0] for step in self._apart]
        before = np.square(forecasts).mean(axis=0).reshape(shape)
        after = np.square([step.roots for step in self._apart]).mean(axis=0).reshape(shape)
        changes = [self._difference(step) for step in self._apart]
        evidence = max(cusum.over_limit for cusum in self._cusums) * self._limit
        return ShiftFinding(
            self._reading,
            len(self._apart),
            steps_of_chance(evidence),
            before,
            after,
            (np.mean(changes, axis=0) / self._noise.deviations()).reshape(shape),
            self._loss_before(),
            float(np.mean([step.losses[0] for step in self._apart])),
        )

    def _known(self) -> tuple[NDArray[np.float64], list[Step]]:
        """The steps that make the line, and their numbers."""
        known = self._usual[: len(self._usual) - self._lag]
        return np.array([step.number for step in known], dtype=np.float64), known

    def _roots(self, step: Step) -> tuple[Row, float]:
        """[L E] square roots as forecast, and by how much more than usual a step may differ."""
        if self._fixed is not None:
            return self._fixed, 1.0
        numbers, known = self._known()
        return forecast(numbers, np.stack([each.roots for each in known]), step.number)

    def _losses(self, step: Step) -> tuple[Row, Row]:
        """[2] losses as forecast, and by how much more than usual those of a step may differ."""
        numbers, known = self._known()
        rows = np.stack([each.losses for each in known])
        found = [forecast(numbers, rows[:, index, None], step.number) for index in range(2)]
        return np.concatenate([row for row, _ in found]), np.array([spread for _, spread in found])

    def _loss_before(self) -> float:
        """Loss as forecast, mean over the steps apart; NaN where there is no line yet."""
        if len(self._usual) - self._lag < _FEWEST:
            return math.nan
        return float(np.mean([self._losses(step)[0][0] for step in self._apart]))

    def _difference(self, step: Step) -> Row:
        """[L E] difference from the forecast: by chance alone each has the standard deviation 1."""
        roots, spread = self._roots(step)
        size = np.repeat(2.0 * np.sqrt(step.totals), len(step.roots) // len(step.totals))
        return (step.roots - roots) * size / spread

    def _compared(self, step: Step) -> tuple[Row, float | None, Row] | None:
        """Difference from the forecast, its log distance, and the losses' residuals [2]."""
        residuals = np.full(2, math.nan)
        if len(self._usual) - self._lag >= _FEWEST:
            losses, spreads = self._losses(step)
            residuals = (step.losses - losses) / spreads
        elif self._fixed is None:
            return None
        difference = self._difference(step)
        return difference, self._noise.log_distance(difference), residuals

    def _judge(self, log_distance: float | None, residuals: Row) -> ShiftReading | None:
        """Add the evidence of a step; None where it cannot be judged yet."""
        warmup = self._settings.warmup * self._settings.window
        if self._num_steps < warmup and self._given is None:
            return None
        score = None if log_distance is None else self._noise.score(log_distance)
        if score is None:
            return None
        self._routing.add(score)
        deviation, spread = (
            noise.score(float(residual))
            for noise, residual in zip(self._loss_noises, residuals, strict=True)
        )
        if deviation is not None:
            self._rise.add(deviation)
            self._fall.add(-deviation)
            # A further kind of text makes sequences differ more, and mostly the loss rise.
            if spread is not None:
                self._mixed.add((deviation + spread) / math.sqrt(2.0))
        losses = self._cusums[1:]
        loss = max(cusum.over_limit for cusum in losses)
        cause: Cause = "router" if self._routing.over_limit > loss else "optimizer"
        evidence = min(self._routing.evidence, max(cusum.evidence for cusum in losses))
        # The sequences differ more, and say more than their mean does.
        is_mixed = self._mixed.over_limit > max(1.0, self._rise.over_limit)
        if evidence > _CONFIRMS or is_mixed:
            cause = "data"
        return ShiftReading(self._routing.over_limit, loss, cause)

    def _learn(
        self, step: Step, difference: Row, log_distance: float | None, residuals: Row
    ) -> None:
        self._noise.learn(difference, log_distance)
        for noise, residual in zip(self._loss_noises, residuals, strict=True):
            noise.learn(float(residual))
        self._usual = [*self._usual, step][-self._span - self._lag :]
        after = self._settings.fixed_after
        if after is not None and self._num_steps >= after and self._fixed is None:
            self._fixed = np.stack([each.roots for each in self._usual]).mean(axis=0)

    def _return(self) -> None:
        """The evidence has gone: learn from the steps apart, but not from those of a shift."""
        apart, self._apart = self._apart, []
        if self._is_shift:
            apart, self._is_shift = apart[-QUIET + 1 :], False
        for step in apart:
            found = self._compared(step)
            if found is not None and not self._is_odd(*found[1:]):
                self._learn(step, *found)

    def _is_odd(self, log_distance: float | None, residuals: Row) -> bool:
        """Whether a step is so unusual that it must not move what others are compared with."""
        scores = [
            noise.score(float(residual))
            for noise, residual in zip(self._loss_noises, residuals, strict=True)
        ]
        found = [abs(score) for score in scores if score is not None]
        if log_distance is not None:
            found.append(self._noise.score(log_distance) or 0.0)
        return self._reading is not None and max(found, default=0.0) > _ODD

    def _accept(self) -> None:
        """The steps apart are what is usual from now on; the noise is learnt from them alone."""
        apart, self._apart, self._usual = self._apart, [], []
        self._is_shift = False
        self._noise = UsageNoise(self._settings)
        self._loss_noises = [LossNoise(self._settings) for _ in range(2)]
        for cusum in self._cusums:
            cusum.clear()
        for step in apart:
            found = self._compared(step)
            if found is None:
                self._usual.append(step)
            else:
                self._learn(step, *found)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON; `load_state_dict` restores it bit for bit."""
        is_own = self._fixed is not None and self._fixed is not self._given
        return {
            "usual": [step.as_json() for step in self._usual],
            "apart": [step.as_json() for step in self._apart],
            "is_shift": self._is_shift,
            "fixed": self._fixed.tolist() if is_own and self._fixed is not None else None,
            "noise": self._noise.as_json(),
            "loss_noises": [noise.as_json() for noise in self._loss_noises],
            "evidence": [cusum.state() for cusum in self._cusums],
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a reference that was given to this monitor stays.

        Raises:
            ValueError: If it is not such a state.
        """
        try:
            self._usual = [Step.from_json(values) for values in state["usual"]]
            self._apart = [Step.from_json(values) for values in state["apart"]]
            self._is_shift = bool(state["is_shift"])
            self._fixed = self._given
            if self._given is None and state["fixed"] is not None:
                self._fixed = np.array(state["fixed"], dtype=np.float64)
            size = len(self._usual[0].roots) if self._usual else 1
            self._noise = UsageNoise.from_json(state["noise"], self._settings, size)
            self._loss_noises = [
                LossNoise(self._settings, residuals) for residuals in state["loss_noises"]
            ]
            for cusum, values in zip(self._cusums, state["evidence"], strict=True):
                cusum.load(values)
            self._num_steps = state["num_steps"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no state of the detector ({error})") from error
