"""`routing_profile.json`: a run's expert usage, to compare other runs with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.json_file import read_json
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.file_names import USAGE_FILE
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift.noise import UsageNoise
from moepp_megatron.runtime.atomic import write_atomic

_FORMAT = "moepp routing profile 2"
# Its noise is that of windows, not of steps.
_OLD_FORMAT = "moepp routing profile 1"


@dataclass(frozen=True, eq=False)
class StoredUsage:
    """The content of the file.

    Attributes:
        usage: Counts of the windows that make the reference.
        token_classes: One digit for each token id, its class by frequency, 0 for the most frequent;
            empty if layers do not know their tokens.
        noise: Differences of steps of the same data; empty in a file of an older version.
    """

    usage: ExpertUsage
    token_classes: str
    noise: UsageNoise

    def write(self, folder: Path) -> None:
        """Write `folder/routing_profile.json`, in one step.

        Raises:
            OSError: If the folder is missing, full or not writable.
        """
        values = {
            "format": _FORMAT,
            "token_classes": self.token_classes,
            "noise": self.noise.as_json(),
            **self.usage.as_json(),
        }
        write_atomic(folder / USAGE_FILE, json.dumps(values).encode())

    @classmethod
    def read(
        cls, path: Path, settings: ShiftSection, name: str = "routing_guard.shift.reference"
    ) -> StoredUsage:
        """Read a file.

        Args:
            settings: Gives the amount of noise to keep.

        Raises:
            ConfigError: If it does not exist, or is not such a file.
        """
        remedy = f"use {USAGE_FILE} of a run with the routing guard"
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
                f"{name} ({path}) must be the expert usage of a run, and {error}; {remedy}"
            ) from error

    @classmethod
    def _from_json(cls, values: Any, settings: ShiftSection) -> StoredUsage:
        if not isinstance(values, dict) or values.get("format") not in (_FORMAT, _OLD_FORMAT):
            raise ValueError(f'its format is not "{_FORMAT}"')
        usage = ExpertUsage.from_json(values)
        classes = values.get("token_classes")
        if not isinstance(classes, str) or not set(classes) <= set("0123456789"):
            raise ValueError("token_classes is no string of digits")
        if values["format"] == _OLD_FORMAT:
            return cls(usage, classes, UsageNoise(settings))
        noise = UsageNoise.from_json(values.get("noise"), settings, usage.experts.size)
        return cls(usage, classes, noise)
