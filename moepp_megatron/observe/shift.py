"""Says when the data has shifted, from how far the routing profile is from its reference.

How far apart the profiles of two windows of the same data are depends on the texts, the model and
the window, so no fixed limit would do. A window's divergence is divided by what independent tokens
would give for windows of these sizes, and its logarithm compared with those of the windows before:
it is a shift above `median + threshold * spread`, where the spread is 1.4826 times the median
absolute deviation, which is the standard deviation of a normal distribution and hardly changes with
a few outliers. A change that training makes over many windows moves the median with it and widens
the spread; a change of the data does so in one window.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.routing_profile import RoutingProfile, divergence, sampling_noise

# A few alike divergences must not make a threshold that the next one passes by chance: of a
# divergence with d free shares the logarithm has the standard deviation sqrt(2 / d), and this is
# that of 800, more than most models' profiles have.
MIN_SPREAD = 0.05


class ShiftMonitor:
    """Judges one window's routing profile after the other.

    The reference is `settings.span` windows without a shift, followed by `settings.lag` newer ones
    that are not yet in it. From `settings.fixed_after` on, or where one is given, it stays; then a
    shift is told for as long as it lasts. A reference that follows is given up for the newest
    windows once `span + lag` windows in a row are shifted: from then on these are what is usual.

    Args:
        settings: Of the configuration.
        reference: A profile to compare with from the first window on; None makes one of the
            windows.
        noise: Log divergences to begin with, of whoever made `reference`.
    """

    def __init__(
        self,
        settings: ShiftSection,
        reference: RoutingProfile | None = None,
        noise: list[float] | None = None,
    ) -> None:
        self._settings = settings
        self._given = reference
        self._fixed = reference
        self._usual: list[RoutingProfile] = []
        self._shifted: list[RoutingProfile] = []
        self._memory = list(noise or [])[-settings.memory :]
        self._num_windows = 0

    @property
    def reference(self) -> RoutingProfile | None:
        """What the next window is compared with; None before there is anything."""
        if self._fixed is not None:
            return self._fixed
        # With too few windows the newest are better than nothing.
        windows = self._usual[: max(len(self._usual) - self._settings.lag, 1)]
        return _sum(windows) if windows else None

    @property
    def newest(self) -> RoutingProfile | None:
        """`settings.span` newest windows without a shift; None before there is one."""
        windows = self._usual[-self._settings.span :]
        return _sum(windows) if windows else None

    @property
    def noise(self) -> list[float]:
        """Log divergences from it of windows without a shift, oldest first.

        None of them while the reference stays: they are then from that.
        """
        return [] if self._fixed is not None else list(self._memory)

    def add(self, profile: RoutingProfile) -> float | None:
        """Judge a window and learn from it.

        Args:
            profile: Of all ranks; of the same shapes in every window.

        Returns:
            The divergence over its threshold: above 1 is a shift. None while there are fewer than
            `settings.warmup` divergences to judge by.
        """
        self._num_windows += 1
        reference = self.reference
        if reference is None:
            self._learn(profile, None)
            return None
        noise = sampling_noise(profile, reference)
        # Below 1 is closer than chance: nothing to tell apart there.
        log_ratio = math.log(max(divergence(profile, reference) / noise, 1.0))
        value = self._over_threshold(log_ratio)
        if value is None or value <= 1.0:
            self._learn(profile, log_ratio)
        else:
            self._suspect(profile)
        return value

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; what comes after `load_state_dict` is the same to the bit."""
        is_own = self._fixed is not None and self._fixed is not self._given
        return {
            "usual": [profile.as_json() for profile in self._usual],
            "shifted": [profile.as_json() for profile in self._shifted],
            "fixed": self._fixed.as_json() if is_own and self._fixed is not None else None,
            "memory": list(self._memory),
            "num_windows": self._num_windows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; a reference that was given to this monitor stays.

        Raises:
            ValueError: A profile in it is none.
        """
        self._usual = [RoutingProfile.from_json(values) for values in state["usual"]]
        self._shifted = [RoutingProfile.from_json(values) for values in state["shifted"]]
        self._fixed = self._given
        if self._given is None and state["fixed"] is not None:
            self._fixed = RoutingProfile.from_json(state["fixed"])
        self._memory = list(state["memory"])
        self._num_windows = state["num_windows"]

    def _over_threshold(self, log_ratio: float) -> float | None:
        settings = self._settings
        if len(self._memory) < min(settings.warmup, settings.memory):
            return None
        memory = np.asarray(self._memory)
        median = float(np.median(memory))
        spread = max(1.4826 * float(np.median(np.abs(memory - median))), MIN_SPREAD)
        return math.exp(log_ratio - median - settings.threshold * spread)

    def _learn(self, profile: RoutingProfile, log_ratio: float | None) -> None:
        """Of a window that is as usual."""
        settings = self._settings
        self._shifted = []
        if log_ratio is not None:
            self._memory = [*self._memory, log_ratio][-settings.memory :]
        self._usual = [*self._usual, profile][-(settings.span + settings.lag) :]
        steps = self._num_windows * settings.window
        fixes = settings.fixed_after is not None and steps >= settings.fixed_after
        if fixes and self._fixed is None:
            self._fixed = self.newest

    def _suspect(self, profile: RoutingProfile) -> None:
        """A window that is not as usual: neither the reference nor the noise is to know it."""
        if self._fixed is not None:
            return
        self._shifted = [*self._shifted, profile]
        if len(self._shifted) == self._settings.span + self._settings.lag:
            self._usual, self._shifted, self._memory = self._shifted, [], []


def _sum(windows: list[RoutingProfile]) -> RoutingProfile:
    total = windows[0]
    for profile in windows[1:]:
        total = total + profile
    return total
