"""The series of a loss that training moves along a line, and those of the data sources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.shift.detector import ROWS, Cusum, Detector, Numbers, Row, limit_for
from moepp_megatron.observe.shift.noise import LossNoise


@dataclass(frozen=True, eq=False)
class Step:
    """A step, counted from 1, as a detector keeps it."""

    number: int
    # [n] loss in nats; behind it perhaps the logarithm of its spread over the sequences.
    losses: Numbers
    # [L] selections of the layers; of a source [1], its tokens.
    totals: Numbers
    # [L E] square roots of the experts' shares; of a source [0].
    roots: Numbers

    def as_json(self) -> list[Any]:
        """The step as JSON, exactly; None for NaN, because saving compares ranks."""
        losses = [None if math.isnan(value) else value for value in self.losses.tolist()]
        return [self.number, self.roots.tolist(), self.totals.tolist(), losses]

    @classmethod
    def from_json(cls, values: list[Any]) -> Step:
        """Undo `as_json`, or read the number, loss and tokens of a source of an older version."""
        number, *rest = values
        if len(rest) == 2:
            rest = [[], rest[1:], rest[:1]]
        roots, totals, losses = (np.array(row, dtype=np.float64) for row in rest)
        return cls(int(number), losses, totals, roots)


class Compared(NamedTuple):
    """What a step differs from its forecast by; None where that is not known."""

    # [n] of the losses, over how much more than a step near the line may differ; NaN without one.
    residuals: Numbers
    # The same in spreads of usual steps.
    scores: list[float | None]
    # [L E] of the routing: by chance alone each number has the standard deviation 1.
    difference: Numbers | None = None
    log_distance: float | None = None
    # Spreads of the distance above usual ones.
    score: float | None = None


class LossDetector(Detector[Step, Compared]):
    """Compares losses with a line through the newest usual steps, and adds up rises and falls."""

    def __init__(self, row: Row, settings: ShiftSection, limit: float, num_losses: int = 1) -> None:
        super().__init__(row, settings)
        self._settings = settings
        self._lag = settings.lag * settings.window if row.lag is None else row.lag
        # Twice as many where the line ends earlier.
        least = row.fewest if row.lag is None else 2 * row.fewest
        self._kept = max(settings.span * settings.window, least) + self._lag
        self._warmup = settings.warmup * settings.window
        self._rise, self._fall = Cusum(limit), Cusum(limit)
        self._cusums = [self._rise, self._fall]
        self._usual: list[Step] = []
        self._noises = [self._new_noise() for _ in range(num_losses)]

    def _new_noise(self) -> LossNoise:
        return LossNoise(self._memory, self._row.judged, by_tokens=self._row.lag is not None)

    @property
    def over_limit(self) -> float:
        """Evidence over its limit."""
        return max(cusum.over_limit for cusum in self._cusums)

    @property
    def is_judged(self) -> bool:
        """Whether there is enough to compare with."""
        return self._noises[0].is_known

    @property
    def first(self) -> int:
        """Number of the first step under suspicion, of which there is one."""
        return self._apart[0].number

    def moved(self) -> tuple[float, float]:
        """Loss as forecast, NaN without a line, and as it is: means over the steps apart."""
        before = math.nan
        if self._has_line:
            before = float(np.mean([self._losses(step)[0][0] for step in self._apart]))
        return before, float(np.mean([step.losses[0] for step in self._apart]))

    @property
    def _has_line(self) -> bool:
        return len(self._usual) - self._lag >= self._row.fewest

    def _known(self) -> tuple[Numbers, list[Step]]:
        """The steps that make the line, and their numbers."""
        known = self._usual[: len(self._usual) - self._lag]
        return np.array([step.number for step in known], dtype=np.float64), known

    def _losses(self, step: Step) -> tuple[Numbers, Numbers]:
        """[n] losses as forecast, and by how much more than usual those of a step may differ."""
        numbers, known = self._known()
        rows = np.stack([each.losses for each in known])
        found = [forecast(numbers, row[:, None], step.number) for row in rows.T]
        return np.concatenate([row for row, _ in found]), np.array([spread for _, spread in found])

    def _compare(self, step: Step) -> Compared:
        residuals = np.full(len(step.losses), math.nan)
        if self._has_line:
            losses, spreads = self._losses(step)
            residuals = (step.losses - losses) / spreads
        tokens = float(step.totals[0])
        pairs = zip(self._noises, residuals.tolist(), strict=True)
        return Compared(residuals, [noise.score(residual, tokens) for noise, residual in pairs])

    def _judge(self, step: Step, compared: Compared) -> None:
        deviation = compared.scores[0]
        if deviation is not None and step.number >= self._warmup:
            self._rise.add(deviation)
            self._fall.add(-deviation)

    def _is_odd(self, compared: Compared) -> bool:
        known = [abs(score) for score in compared.scores if score is not None]
        return max(known, default=0.0) > self._row.odd

    def _learn(self, step: Step, compared: Compared) -> None:
        for noise, residual in zip(self._noises, compared.residuals.tolist(), strict=True):
            noise.learn(residual, float(step.totals[0]))
        self._usual = [*self._usual, step][-self._kept :]

    def _forget(self) -> None:
        self._usual, self._noises = [], [self._new_noise() for _ in self._noises]
        for cusum in self._cusums:
            cusum.clear()

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON, the same on every rank."""
        return {
            "usual": [step.as_json() for step in self._usual],
            "apart": [step.as_json() for step in self._apart],
            "is_shift": self._is_shift,
            "loss_noises": [noise.as_json() for noise in self._noises],
            "evidence": [cusum.state() for cusum in self._cusums],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, to the bit.

        Raises:
            ValueError: If it is not such a state.
        """
        try:
            self._usual = [Step.from_json(values) for values in state["usual"]]
            self._apart = [Step.from_json(values) for values in state["apart"]]
            self._is_shift = bool(state["is_shift"])
            # Of a source of an older version there is one list of residuals.
            known = [state["residuals"]] if "residuals" in state else state["loss_noises"]
            for noise, residuals in zip(self._noises, known, strict=True):
                noise.load(residuals)
            for cusum, values in zip(self._cusums, state["evidence"], strict=True):
                cusum.load(values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"it is no state of the detector ({error})") from error


class SourceShift:
    """Judges the losses of the data sources, each by itself.

    A small source that turns bad hardly moves the mean over the batch, but its own loss at once.
    The limit is that of `false_alarm_steps` times the number of CUSUMs, so that all of them
    together raise one false alarm in that many steps (Bonferroni).
    """

    def __init__(self, settings: ShiftSection, names: Sequence[str]) -> None:
        row, self._num_steps = ROWS["source"], 0
        limit = row.limit * limit_for(settings.false_alarm_steps * 2 * max(len(names), 1))
        self._detectors = {name: LossDetector(row, settings, limit) for name in names}

    def add(self, losses: Numbers) -> float:
        """Judge a step and learn from it.

        Args:
            losses: [sources, 2] sum of token losses in nats, and tokens, over all ranks.

        Returns:
            The largest evidence over its limit, above 1 where a source has shifted; NaN before
            there is enough to compare with.
        """
        self._num_steps += 1
        for detector, (total, tokens) in zip(
            self._detectors.values(), losses.tolist(), strict=True
        ):
            if tokens > 0 and math.isfinite(total):
                loss, weight = np.array([[total / tokens], [tokens]])
                detector.see(Step(self._num_steps, loss, weight, np.zeros(0)))
        return self.over_limit

    @property
    def over_limit(self) -> float:
        """Result of the newest `add`."""
        judged = [each.over_limit for each in self._detectors.values() if each.is_judged]
        return max(judged, default=math.nan)

    @property
    def steps(self) -> int:
        """Steps since the first evidence against a source that has shifted; 0 without one."""
        firsts = [each.first for each in self._detectors.values() if each.has_shifted]
        return self._num_steps - min(firsts) + 1 if firsts else 0

    def moved(self) -> list[str]:
        """The sources that have shifted, a line each, those with most evidence first."""
        found = sorted(self._detectors.items(), key=lambda pair: -pair[1].over_limit)
        return [
            "source {}: loss {:.2f} -> {:.2f}".format(name, *detector.moved())
            for name, detector in found
            if detector.has_shifted
        ]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, of plain numbers and names, the same on every rank."""
        courses = [detector.state_dict() for detector in self._detectors.values()]
        return {"names": [*self._detectors], "num_steps": self._num_steps, "courses": courses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`; sources of other names begin anew."""
        self._num_steps = state["num_steps"]
        for name, course in zip(state["names"], state["courses"], strict=True):
            if name in self._detectors:
                self._detectors[name].load_state_dict(course)


def forecast(steps: Numbers, rows: Numbers, step: float) -> tuple[Numbers, float]:
    """What the line through known rows gives at a further step.

    The line of least squares, with its slope shrunk by how sure it is: the factor is
    `max(0, 1 - 1/F)`, where F is the mean over the numbers of their slope's square over its
    variance. A slope that chance alone would give is none, so that a forecast far ahead is not led
    astray.

    Args:
        steps: [N] step numbers of the rows, N at least 3, at least two of them different.
        rows: [N, D] numbers that move together.
        step: The further step.

    Returns:
        [D] the forecast, and the standard deviation of what a step differs from it by, over that of
        a step from the true line.
    """
    around = steps - steps.mean()
    squares = float(around @ around)
    ahead = step - float(steps.mean())
    mean = rows.mean(axis=0)
    slope = around @ rows / squares
    rest = rows - mean - np.outer(around, slope)
    variance = np.square(rest).sum(axis=0) / (len(steps) - 2) / squares
    moves = variance > 0.0
    ratio = float(np.mean(np.square(slope[moves]) / variance[moves])) if moves.any() else math.inf
    sure = max(0.0, 1.0 - 1.0 / ratio) if ratio > 0.0 else 0.0
    spread = math.sqrt(1.0 + 1.0 / len(steps) + sure * ahead * ahead / squares)
    return mean + sure * ahead * slope, spread
