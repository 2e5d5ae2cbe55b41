"""`routing_profile.json`: a run's routing profile, to compare other runs with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.observe.profile_noise import ProfileNoise
from moepp_megatron.observe.routing_profile import RoutingProfile
from moepp_megatron.runtime.atomic import write_atomic

PROFILE_FILE = "routing_profile.json"
_FORMAT = "moepp routing profile 2"
# Its noise is that of windows, not of steps.
_OLD_FORMAT = "moepp routing profile 1"


@dataclass(frozen=True, eq=False)
class StoredProfile:
    """The content of the file.

    Attributes:
        profile: Counts of the windows that make the reference.
        token_classes: One digit for each token id, its class by frequency, 0 for the most frequent;
            empty if layers do not know their tokens.
        noise: Differences of steps of the same data; empty in a file of an older version.
    """

    profile: RoutingProfile
    token_classes: str
    noise: ProfileNoise

    def write(self, folder: Path) -> None:
        """Write `folder/routing_profile.json`, in one step.

        Raises:
            OSError: If the folder is missing, full or not writable.
        """
        values = {
            "format": _FORMAT,
            "token_classes": self.token_classes,
            "noise": self.noise.as_json(),
            **self.profile.as_json(),
        }
        write_atomic(folder / PROFILE_FILE, json.dumps(values).encode())

    @classmethod
    def read(
        cls, path: Path, settings: ShiftSection, name: str = "routing_guard.shift.reference"
    ) -> StoredProfile:
        """Read a file.

        Args:
            path: The file.
            settings: Gives the amount of noise to keep.
            name: The setting that names it, for messages.

        Raises:
            ConfigError: If it does not exist, or is not such a file.
        """
        remedy = f"use {PROFILE_FILE} of a run with the routing guard"
        try:
            values = read_json(path)
        except OSError as error:
            raise ConfigError(
                f"{name} ({path}) must be a file that can be read ({error.strerror}); {remedy}"
            ) from error
        except ValueError as error:
            raise ConfigError(f"{name} ({path}) must be a JSON file ({error}); {remedy}") from error
        try:
            return cls._from_json(values, settings)
        except ValueError as error:
            raise ConfigError(
                f"{name} ({path}) must be a routing profile, and {error}; {remedy}"
            ) from error

    @classmethod
    def _from_json(cls, values: Any, settings: ShiftSection) -> StoredProfile:
        if not isinstance(values, dict) or values.get("format") not in (_FORMAT, _OLD_FORMAT):
            raise ValueError(f'its format is not "{_FORMAT}"')
        profile = RoutingProfile.from_json(values)
        classes = values.get("token_classes")
        if not isinstance(classes, str) or not set(classes) <= set("0123456789"):
            raise ValueError("token_classes is no string of digits")
        if values["format"] == _OLD_FORMAT:
            return cls(profile, classes, ProfileNoise(settings))
        noise = ProfileNoise.from_json(values.get("noise"), settings, profile.experts.size)
        return cls(profile, classes, noise)
