"""Says when the data has shifted, from how far the routing profile is from its reference."""

from __future__ import annotations

from typing import Any

from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.profile_noise import ProfileNoise
from moepp_megatron.observe.routing_profile import RoutingProfile, difference


class ShiftMonitor:
    """Judges one window's routing profile after the other.

    The reference is `settings.span` windows without a shift, followed by `settings.lag` newer ones
    that are not yet in it. From `settings.fixed_after` on, or where one is given, it stays; then a
    shift is told for as long as it lasts. A reference that follows is given up for the newest
    windows once `span + lag` windows in a row are shifted: from then on these are what is usual.

    How far is too far depends on the texts, the model and the window. `ProfileNoise` learns it from
    the windows without a shift. A change that training makes over many windows is part of what it
    learns; one of the data comes in one window.

    Args:
        settings: Of the configuration.
        reference: A profile to compare with from the first window on; None makes one of the
            windows.
        noise: What to begin with, of whoever made `reference`.
    """

    def __init__(
        self,
        settings: ShiftSection,
        reference: RoutingProfile | None = None,
        noise: ProfileNoise | None = None,
    ) -> None:
        self._settings = settings
        self._given = reference
        self._fixed = reference
        self._usual: list[RoutingProfile] = []
        self._shifted: list[RoutingProfile] = []
        self._noise = ProfileNoise(settings) if noise is None else noise
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
    def noise(self) -> ProfileNoise:
        """How windows without a shift differ from `newest`.

        Nothing of it is known while the reference stays: they are compared with that.
        """
        return self._noise if self._fixed is None else ProfileNoise(self._settings)

    def add(self, profile: RoutingProfile) -> float | None:
        """Judge a window and learn from it.

        Args:
            profile: Of all ranks; of the same shapes in every window.

        Returns:
            The distance over its limit: above 1 is a shift. None while fewer than `settings.warmup`
            distances tell what is usual.
        """
        self._num_windows += 1
        reference = self.reference
        if reference is not None:
            changes = difference(profile, reference)
            distance = self._noise.log_distance(changes)
            value = None if distance is None else self._noise.over_limit(distance)
            if value is not None and value > 1.0:
                self._suspect(profile)
                return value
            self._noise.learn(changes, distance)
        else:
            value = None
        self._keep(profile)
        return value

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; what comes after `load_state_dict` is the same to the bit."""
        is_own = self._fixed is not None and self._fixed is not self._given
        return {
            "usual": [profile.as_json() for profile in self._usual],
            "shifted": [profile.as_json() for profile in self._shifted],
            "fixed": self._fixed.as_json() if is_own and self._fixed is not None else None,
            "noise": self._noise.as_json(),
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
        reference = self.reference
        size = 1 if reference is None else reference.size
        self._noise = ProfileNoise.from_json(state["noise"], self._settings, size)
        self._num_windows = state["num_windows"]

    def _keep(self, profile: RoutingProfile) -> None:
        """A window that is as usual."""
        settings = self._settings
        self._shifted = []
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
            self._usual, self._shifted = self._shifted, []
            self._noise = ProfileNoise(self._settings)


def _sum(windows: list[RoutingProfile]) -> RoutingProfile:
    total = windows[0]
    for profile in windows[1:]:
        total = total + profile
    return total
