"""The series of the use of the experts, judged together with the loss of all data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import Counts
from moepp_megatron.observe.shift.detector import ROWS, Cusum, Numbers, limit_for, steps_of_chance
from moepp_megatron.observe.shift.losses import Compared, LossDetector, Step, forecast
from moepp_megatron.observe.shift.noise import UsageNoise
from moepp_megatron.observe.shift.reading import Cause, ShiftFinding, ShiftReading

# Evidence, in standard deviations, from which one of loss and routing confirms an alarm of the
# other: chance alone gives as much once in some hundred steps.
_CONFIRMS = 2.5


class RoutingDetector(LossDetector):
    """Judges routing and loss together, so that each says what the other's evidence means.

    Each step's shares (their square roots, whose noise does not depend on them: Hellinger) are
    compared with the forecast of a line too, and the logarithm of the loss's spread over the
    sequences, because a further kind of text makes sequences differ more.

    Attributes:
        reading: Result of the newest step; None where it was not judged.
    """

    def __init__(
        self,
        settings: ShiftSection,
        reference: Counts | None = None,
        noise: UsageNoise | None = None,
    ) -> None:
        row = ROWS["routing"]
        self._limit = settings.threshold or limit_for(settings.false_alarm_steps)
        super().__init__(row, settings, self._limit, num_losses=2)
        self._given = None if reference is None else _square_roots(reference).ravel()
        self._fixed = self._given
        if reference is not None:
            self._warmup = 0
        self._routing, self._mixed = Cusum(row.limit * self._limit), Cusum(self._limit)
        self._cusums = [self._routing, self._rise, self._fall, self._mixed]
        self._noise = UsageNoise(settings) if noise is None else noise
        self._num_steps = 0
        self.reading: ShiftReading | None = None

    @property
    def noise(self) -> UsageNoise:
        """Differences of usual steps from their forecasts; unknown while the reference is fixed."""
        return self._noise if self._fixed is None else UsageNoise(self._settings)

    def add(self, experts: Counts, loss: float, spread: float) -> None:
        """Judge a step, as `ShiftMonitor.add` gives it, and learn from it."""
        self._num_steps += 1
        totals = experts.sum(axis=1).astype(np.float64)
        losses = np.array([loss, math.log(spread) if spread > 0 else math.nan])
        self.see(Step(self._num_steps, losses, totals, _square_roots(experts).ravel()))

    def explain(self) -> ShiftFinding | None:
        """What has moved; None where no step is suspect."""
        if self.reading is None or not self._apart:
            return None
        shape = len(self._apart[0].totals), -1
        forecasts = [self._roots(step)[0] for step in self._apart]
        before = np.square(forecasts).mean(axis=0).reshape(shape)
        after = np.square([step.roots for step in self._apart]).mean(axis=0).reshape(shape)
        changes = [self._difference(step) for step in self._apart]
        surprise = (np.mean(changes, axis=0) / self._noise.deviations()).reshape(shape)
        chance = steps_of_chance(self.over_limit * self._limit)
        cause, steps = self.reading.cause, len(self._apart)
        return ShiftFinding(cause, steps, chance, before, after, surprise, *self.moved())

    @property
    def _is_fixed(self) -> bool:
        return self._fixed is not None

    def _roots(self, step: Step) -> tuple[Numbers, float]:
        """[L E] square roots as forecast, and by how much more than usual a step may differ."""
        if self._fixed is not None:
            return self._fixed, 1.0
        numbers, known = self._known()
        return forecast(numbers, np.stack([each.roots for each in known]), step.number)

    def _difference(self, step: Step) -> Numbers:
        """[L E] difference from the forecast: by chance alone each has the standard deviation 1."""
        roots, spread = self._roots(step)
        size = np.repeat(2.0 * np.sqrt(step.totals), len(step.roots) // len(step.totals))
        return (step.roots - roots) * size / spread

    def _compare(self, step: Step) -> Compared:
        compared = super()._compare(step)
        if not (self._has_line or self._is_fixed):
            return compared
        difference = self._difference(step)
        log_distance = self._noise.log_distance(difference)
        score = self._noise.score(log_distance)
        return compared._replace(difference=difference, log_distance=log_distance, score=score)

    def _judge(self, step: Step, compared: Compared) -> None:
        self.reading = None
        if step.number < self._warmup or compared.score is None:
            return
        self._routing.add(compared.score)
        super()._judge(step, compared)
        deviation, spread = compared.scores
        # A further kind of text mostly makes the loss rise as well.
        if deviation is not None and spread is not None:
            self._mixed.add((deviation + spread) / math.sqrt(2.0))
        losses = self._cusums[1:]
        loss = max(cusum.over_limit for cusum in losses)
        cause: Cause = "router" if self._routing.over_limit > loss else "optimizer"
        evidence = min(self._routing.evidence, max(cusum.evidence for cusum in losses))
        # The sequences differ more, and say more than their mean does.
        is_mixed = self._mixed.over_limit > max(1.0, self._rise.over_limit)
        if evidence > _CONFIRMS or is_mixed:
            cause = "data"
        self.reading = ShiftReading(self._routing.over_limit, loss, cause)

    def _is_odd(self, compared: Compared) -> bool:
        is_far = super()._is_odd(compared) or (compared.score or 0.0) > self._row.odd
        return self.reading is not None and is_far

    def _learn(self, step: Step, compared: Compared) -> None:
        super()._learn(step, compared)
        if compared.difference is None:
            return
        self._noise.learn(compared.difference, compared.log_distance)
        after = self._settings.fixed_after
        if after is not None and self._num_steps >= after and self._fixed is None:
            self._fixed = np.stack([each.roots for each in self._usual]).mean(axis=0)

    def _forget(self) -> None:
        super()._forget()
        self._noise = UsageNoise(self._settings)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON, the same on every rank."""
        own = None if self._fixed is None or self._fixed is self._given else self._fixed.tolist()
        further = {"fixed": own, "noise": self._noise.as_json(), "num_steps": self._num_steps}
        return super().state_dict() | further

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; a reference that was given to this detector stays."""
        super().load_state_dict(state)
        try:
            self._fixed = self._given
            if self._given is None and state["fixed"] is not None:
                self._fixed = np.array(state["fixed"], dtype=np.float64)
            size = len(self._usual[0].roots) if self._usual else 1
            self._noise = UsageNoise.from_json(state["noise"], self._settings, size)
            self._num_steps = state["num_steps"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no state of the detector ({error})") from error


def _square_roots(experts: Counts) -> Numbers:
    """[L, E] square roots of the shares of each layer's selections; 0 where there are none."""
    counts = experts.astype(np.float64)
    return np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0))
