"""Detects shifts of the data by the distance of the expert usage from its reference."""

from __future__ import annotations

from typing import Any

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.expert_usage import ExpertUsage, difference
from moepp_megatron.observe.usage_noise import UsageNoise


class ShiftMonitor:
    """Judges one window's expert usage after the other.

    The reference is `settings.span` windows without a shift, followed by `settings.lag` newer ones
    that are not yet in it. From `settings.fixed_after` on, or if one is given, it is fixed; then a
    shift is reported for as long as it lasts. A reference that is not fixed is replaced by the
    newest windows once `span + lag` windows in a row are shifted.

    The limit depends on the texts, the model and the window. `UsageNoise` learns it from
    the windows without a shift. It includes changes that training makes over many windows; a change
    of the data comes in one window.

    Args:
        settings: Settings of the configuration.
        reference: Usage to compare with from the first window on; None makes one of the
            windows.
        noise: Initial noise, from the run of `reference`.
    """

    def __init__(
        self,
        settings: ShiftSection,
        reference: ExpertUsage | None = None,
        noise: UsageNoise | None = None,
    ) -> None:
        self._settings = settings
        self._given = reference
        self._fixed = reference
        self._usual: list[ExpertUsage] = []
        self._shifted: list[ExpertUsage] = []
        self._noise = UsageNoise(settings) if noise is None else noise
        self._num_windows = 0

    @property
    def reference(self) -> ExpertUsage | None:
        """The reference of the next window; None before there is one."""
        if self._fixed is not None:
            return self._fixed
        # With too few windows the newest are better than nothing.
        windows = self._usual[: max(len(self._usual) - self._settings.lag, 1)]
        return _sum(windows) if windows else None

    @property
    def newest(self) -> ExpertUsage | None:
        """`settings.span` newest windows without a shift; None before there is one."""
        windows = self._usual[-self._settings.span :]
        return _sum(windows) if windows else None

    @property
    def noise(self) -> UsageNoise:
        """Differences of windows without a shift from `newest`.

        It is unknown while the reference is fixed, because windows are compared with that.
        """
        return self._noise if self._fixed is None else UsageNoise(self._settings)

    def add(self, usage: ExpertUsage) -> float | None:
        """Judge a window and learn from it.

        Args:
            usage: Usage over all ranks, with the same shapes in every window.

        Returns:
            The distance over its limit: above 1 is a shift. None while fewer than `settings.warmup`
            distances are known.
        """
        self._num_windows += 1
        reference = self.reference
        if reference is not None:
            changes = difference(usage, reference)
            distance = self._noise.log_distance(changes)
            value = None if distance is None else self._noise.over_limit(distance)
            if value is not None and value > 1.0:
                self._suspect(usage)
                return value
            self._noise.learn(changes, distance)
        else:
            value = None
        self._keep(usage)
        return value

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON; `load_state_dict` restores it bit for bit."""
        is_own = self._fixed is not None and self._fixed is not self._given
        return {
            "usual": [usage.as_json() for usage in self._usual],
            "shifted": [usage.as_json() for usage in self._shifted],
            "fixed": self._fixed.as_json() if is_own and self._fixed is not None else None,
            "noise": self._noise.as_json(),
            "num_windows": self._num_windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a reference that was given to this monitor stays.

        Raises:
            ValueError: If it holds invalid usage.
        """
        self._usual = [ExpertUsage.from_json(values) for values in state["usual"]]
        self._shifted = [ExpertUsage.from_json(values) for values in state["shifted"]]
        self._fixed = self._given
        if self._given is None and state["fixed"] is not None:
            self._fixed = ExpertUsage.from_json(state["fixed"])
        reference = self.reference
        size = 1 if reference is None else reference.size
        self._noise = UsageNoise.from_json(state["noise"], self._settings, size)
        self._num_windows = state["num_windows"]

    def _keep(self, usage: ExpertUsage) -> None:
        """Add a window without a shift to the reference and the noise."""
        settings = self._settings
        self._shifted = []
        self._usual = [*self._usual, usage][-(settings.span + settings.lag) :]
        steps = self._num_windows * settings.window
        fixes = settings.fixed_after is not None and steps >= settings.fixed_after
        if fixes and self._fixed is None:
            self._fixed = self.newest

    def _suspect(self, usage: ExpertUsage) -> None:
        """Note a window with a shift, which neither the reference nor the noise uses."""
        if self._fixed is not None:
            return
        self._shifted = [*self._shifted, usage]
        if len(self._shifted) == self._settings.span + self._settings.lag:
            self._usual, self._shifted = self._shifted, []
            self._noise = UsageNoise(self._settings)


def _sum(windows: list[ExpertUsage]) -> ExpertUsage:
    total = windows[0]
    for usage in windows[1:]:
        total = total + usage
    return total
