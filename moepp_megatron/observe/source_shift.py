"""Detects a data source whose loss leaves its course, as `shift.py` does that of all the data.

A small source that turns bad hardly moves the mean over the batch, but its own loss at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.course import forecast
from moepp_megatron.observe.cusum import QUIET, Cusum, limit_for
from moepp_megatron.observe.usage_noise import least_steps, usual

# Steps with the source that make a line, and residuals that make a spread, at least.
_FEWEST, _FEWEST_JUDGED = 12, 30
# Newest usual steps that are not in the line yet, so that the first steps of a change, which are
# not suspect by themselves, do not bend it.
_HELD = 5
# Differences from a line that ends earlier move together and so add up sooner: the limit is that
# of independent ones times this.
_TOGETHER = 1.35
# A loss that moves by less, in nats, has not moved.
_LEAST_SPREAD = 0.01
# Evidence over its limit from which steps are not learnt from until they prove to be usual, and
# spreads from which a single one is not.
_SUSPECT, _ODD = 0.75, 4.0


class SourceShift:
    """Judges the sources' losses step after step.

    Each has two CUSUMs, upwards and downwards. Their limit is that of `false_alarm_steps` times
    their number, so that all of them together raise one false alarm in that many steps
    (Bonferroni). What the limit is multiplied by was chosen on drawn losses.

    Args:
        settings: Settings of the configuration.
        names: Names of the sources.
    """

    def __init__(self, settings: ShiftSection, names: Sequence[str]) -> None:
        self._names = list(names)
        self._warmup, self._num_steps = settings.warmup * settings.window, 0
        steps = settings.false_alarm_steps * 2 * max(len(self._names), 1)
        limit = _TOGETHER * limit_for(steps)
        self._courses = [_Course(settings, limit) for _ in self._names]

    def add(self, losses: NDArray[np.float64]) -> float:
        """Judge a step and learn from it.

        Args:
            losses: [sources, 2] sum of token losses in nats, and tokens, over all ranks.

        Returns:
            The largest evidence over its limit, above 1 where a source has shifted; NaN before
            there is enough to compare with.
        """
        self._num_steps += 1
        for course, (total, tokens) in zip(self._courses, losses.tolist(), strict=True):
            if tokens > 0 and math.isfinite(total):
                is_judged = self._num_steps >= self._warmup
                course.add(self._num_steps, total / tokens, tokens, is_judged)
        return self.over_limit

    @property
    def over_limit(self) -> float:
        """Result of the newest `add`."""
        known = [course.over_limit for course in self._courses if course.is_judged]
        return max(known, default=math.nan)

    @property
    def steps(self) -> int:
        """Steps since the first evidence against a source that has shifted; 0 without one."""
        firsts = [course.apart[0][0] for course in self._courses if course.has_shifted]
        return self._num_steps - int(min(firsts)) + 1 if firsts else 0

    def moved(self) -> list[str]:
        """The sources that have shifted, a line each, those with most evidence first."""
        pairs = zip(self._courses, self._names, strict=True)
        found = sorted(pairs, key=lambda pair: -pair[0].over_limit)
        return [f"source {name}: {course.text()}" for course, name in found if course.has_shifted]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, of plain numbers and names, the same on every rank."""
        courses = [course.state() for course in self._courses]
        return {"names": self._names, "num_steps": self._num_steps, "courses": courses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; sources of other names begin anew."""
        self._num_steps = state["num_steps"]
        known = dict(zip(state["names"], state["courses"], strict=True))
        for course, name in zip(self._courses, self._names, strict=True):
            if name in known:
                course.load(known[name])


# Number of the step, loss in nats, tokens.
_Step = tuple[float, float, float]


class _Course:
    """The loss of one source: a line through its newest usual steps, and how far steps are from it.

    The spread of a step's loss is `sqrt(s^2 / tokens + 0.01^2)`: s is 1.4826 times the median
    absolute residual, each times the root of its tokens.
    """

    def __init__(self, settings: ShiftSection, limit: float) -> None:
        self._span = max(settings.span * settings.window, 2 * _FEWEST)
        self._memory = least_steps(settings)
        self._usual: list[_Step] = []
        # Residuals of usual steps times the root of their tokens.
        self._residuals: list[float] = []
        self._cusums = Cusum(limit), Cusum(limit)
        self._is_shift = False
        self.apart: list[_Step] = []

    @property
    def is_judged(self) -> bool:
        """Whether there is enough to compare with."""
        return len(self._residuals) >= _FEWEST_JUDGED

    @property
    def over_limit(self) -> float:
        """Evidence over its limit."""
        return max(cusum.over_limit for cusum in self._cusums)

    @property
    def has_shifted(self) -> bool:
        """Whether it is above 1 now."""
        return self.over_limit > 1.0 and bool(self.apart)

    def text(self) -> str:
        """Loss as forecast and as it is, means over the steps apart."""
        before = float(np.mean([self._forecast(step)[0] for step in self.apart]))
        return f"loss {before:.2f} -> {float(np.mean([loss for _, loss, _ in self.apart])):.2f}"

    def add(self, number: int, loss: float, tokens: float, is_judged: bool) -> None:
        """Judge a step of the source, and learn from it unless it is suspect."""
        step = float(number), loss, tokens
        score = self._score(step)
        if score is not None and is_judged:
            rise, fall = self._cusums
            rise.add(score)
            fall.add(-score)
        self._is_shift = self._is_shift or self.over_limit > 1.0
        if self.over_limit > _SUSPECT or (score is not None and abs(score) > _ODD):
            self.apart.append(step)
            if len(self.apart) >= self._memory:
                self._accept()
        else:
            self._return()
            self._learn(step)

    def _forecast(self, step: _Step) -> tuple[float, float]:
        """Loss by the line, and by how much more than usual a step may differ from it."""
        numbers, losses, _ = np.array(self._usual[:-_HELD]).T
        row, spread = forecast(numbers, losses[:, None], step[0])
        return float(row[0]), spread

    def _residual(self, step: _Step) -> float | None:
        """Difference from the line in units of usual ones; None without a line."""
        if len(self._usual) < _FEWEST + _HELD:
            return None
        expected, spread = self._forecast(step)
        return (step[1] - expected) / spread

    def _score(self, step: _Step) -> float | None:
        """Spreads from the line; None before they are known."""
        residual = self._residual(step)
        if residual is None or not self.is_judged:
            return None
        _, spread = usual(self._residuals, 0.0)
        return residual / math.hypot(spread / math.sqrt(step[2]), _LEAST_SPREAD)

    def _learn(self, step: _Step) -> None:
        residual = self._residual(step)
        if residual is not None:
            scaled = residual * math.sqrt(step[2])
            self._residuals = [*self._residuals, scaled][-self._memory :]
        self._usual = [*self._usual, step][-self._span - _HELD :]

    def _return(self) -> None:
        """The evidence has gone: learn from the steps apart, but not from those of a shift."""
        apart, self.apart = self.apart, []
        if self._is_shift:
            apart, self._is_shift = apart[-QUIET + 1 :], False
        for step in apart:
            score = self._score(step)
            if score is None or abs(score) <= _ODD:
                self._learn(step)

    def _accept(self) -> None:
        """The steps apart are what is usual from now on."""
        apart, self.apart = self.apart, []
        self._usual, self._residuals, self._is_shift = [], [], False
        for cusum in self._cusums:
            cusum.clear()
        for step in apart:
            self._learn(step)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            "usual": [list(step) for step in self._usual],
            "apart": [list(step) for step in self.apart],
            "residuals": list(self._residuals),
            "evidence": [cusum.state() for cusum in self._cusums],
            "is_shift": self._is_shift,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._usual = [(float(a), float(b), float(c)) for a, b, c in state["usual"]]
        self.apart = [(float(a), float(b), float(c)) for a, b, c in state["apart"]]
        self._residuals = [float(value) for value in state["residuals"]]
        for cusum, values in zip(self._cusums, state["evidence"], strict=True):
            cusum.load(values)
        self._is_shift = bool(state["is_shift"])
