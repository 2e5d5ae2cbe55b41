"""A run's progress, and the record of it in a checkpoint."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError, Layout
from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import STATE_FILE
from moepp_megatron.runtime.optional import version_of
from moepp_megatron.version import __version__

_FORMAT_VERSION = 1
# What decides the bits of a step; the last two where they are installed.
_PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine")


class NewerFormatError(ConfigError):
    """A checkpoint was written by a newer version, in a format that this one does not read."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run at one moment.

    It is frozen, so that a save in progress keeps the state at which it was started.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Training sequences read by all ranks.
        tokens: Tokens trained on.
        skipped_steps: Batches that the numerical guard refused.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0

    def after_step(self, samples: int, tokens: int) -> Progress:
        """Progress after one optimizer step."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            tokens=self.tokens + tokens,
        )

    def after_skip(self, samples: int) -> Progress:
        """Progress after a refused batch."""
        return replace(
            self,
            consumed_samples=self.consumed_samples + samples,
            skipped_steps=self.skipped_steps + 1,
        )


@dataclass
class SavedRecord:
    """The content of `state.json`: plain numbers that need no unpickling.

    `layout` is the rank grid and `versions` are the packages that wrote the checkpoint; `saved_at`
    is in seconds since 1970; `format_version` counts this record's format and the tensor names.
    """

    progress: Progress
    layout: dict[str, int]
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: float = 0.0
    format_version: int = _FORMAT_VERSION

    @classmethod
    def now(cls, progress: Progress, layout: Layout) -> SavedRecord:
        """A record of the present state."""
        return cls(progress, grid(layout), package_versions(), time.time())

    def to_json(self) -> bytes:
        """Same as `state.json`."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def changed_versions(self) -> list[str]:
        """Each package whose version differs here, as `torch 2.11.0 (now 2.15.0)`."""
        now = package_versions()
        return [
            f"{name} {version} (now {now.get(name, 'none')})"
            for name, version in self.versions.items()
            if now.get(name) != version
        ]


def grid(layout: Layout) -> dict[str, int]:
    """The degrees of parallelism that decide which rank draws which random numbers."""
    degrees = asdict(layout)
    del degrees["num_microbatches"]
    return degrees


def read_record(checkpoint: Path) -> SavedRecord | None:
    """A checkpoint's record; None if it has none, as weights from `moepp convert`.

    Raises:
        NewerFormatError: It has a newer format.
        ValueError: The file is there but cannot be read.
    """
    path = checkpoint / STATE_FILE
    try:
        content: dict[str, Any] = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{STATE_FILE} cannot be read ({error})") from error
    try:
        version = content["format_version"]
        versions = dict(content.get("versions", {}))
        if version > _FORMAT_VERSION:
            raise NewerFormatError(
                f"checkpoint ({checkpoint}) must have format {_FORMAT_VERSION}, and {STATE_FILE} "
                f"has format {version}; use the moepp_megatron that wrote it "
                f"({versions.get('moepp_megatron', 'a newer one')}), or move the checkpoint away"
            )
        progress = Progress(**content["progress"])
        layout, saved_at = dict(content["layout"]), float(content["saved_at"])
        counts = (*asdict(progress).values(), *layout.values())
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("a count that is none")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{STATE_FILE} is no record of a checkpoint ({error!r})") from error
    return SavedRecord(progress, layout, versions, saved_at, version)


def package_versions() -> dict[str, str]:
    """The version of each package here that decides the bits of a step, and of Python."""
    versions = {"moepp_megatron": __version__, "python": platform.python_version()}
    found = {name: version_of(name) for name in _PACKAGES}
    return versions | {name: version for name, version in found.items() if version is not None}
