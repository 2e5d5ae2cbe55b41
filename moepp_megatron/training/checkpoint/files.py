"""The files of a checkpoint: their names, and whether all are there and undamaged.

A checkpoint is a folder `step_NNNNNNNN` in megatron-core's distributed format, plus everything
that makes it usable by itself:

    __R_0.distcp     the shards that rank R wrote
    .metadata        the index of tensors (torch.distributed.checkpoint)
    metadata.json    the format (megatron-core)
    config.yaml      resolved configuration
    tokenizer.json   copied from the run's data
    tokenizer_config.json  its end-of-document token, where the data name one
    chat_template.jinja  where the data are conversations: how messages become text
    state.json       progress, layout, versions, time
    integrity.json   SHA-256 and size of every other file (megatron-core's manifest)

Reads bytes only; unpickles nothing. `state.json` is `SavedRecord`, with the run's `Progress`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moepp_megatron.config import ConfigError, Layout
from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import (
    CONFIG_FILE,
    FORMAT_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FILE,
)
from moepp_megatron.runtime.optional import version_of
from moepp_megatron.version import __version__

_FORMAT_VERSION = 1
# What decides the bits of a step; the last two where they are installed.
_PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine")


class NewerFormatError(ConfigError):
    """A checkpoint was written by a newer version, in a format that this one does not read."""


@dataclass(frozen=True)
class Progress:
    """Progress of a run at one moment; frozen, because a save in progress still refers to it.

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

    def back_at(self, earlier: Progress) -> Progress:
        """Progress after going back to an earlier state; data continue after all that was read."""
        return replace(
            earlier, consumed_samples=self.consumed_samples, skipped_steps=self.skipped_steps
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

    @classmethod
    def read(cls, checkpoint: Path) -> SavedRecord | None:
        """A checkpoint's record; None if it has none, as weights from `moepp convert`.

        NewerFormatError if it has a newer format, ValueError if the file cannot be read.
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
                    f"checkpoint ({checkpoint}) must have format {_FORMAT_VERSION}, and "
                    f"{STATE_FILE} has format {version}; use the moepp_megatron that wrote it "
                    f"({versions.get('moepp_megatron', 'a newer one')}), or move the checkpoint "
                    "away"
                )
            progress = Progress(**content["progress"])
            layout, saved_at = dict(content["layout"]), float(content["saved_at"])
            counts = (*asdict(progress).values(), *layout.values())
            if not all(type(count) is int and count >= 0 for count in counts):
                raise TypeError("a count that is none")
        except (KeyError, TypeError) as error:
            raise ValueError(f"{STATE_FILE} is no record of a checkpoint ({error!r})") from error
        return cls(progress, layout, versions, saved_at, version)

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


def package_versions() -> dict[str, str]:
    """The version of each package here that decides the bits of a step, and of Python."""
    versions = {"moepp_megatron": __version__, "python": platform.python_version()}
    found = {name: version_of(name) for name in _PACKAGES}
    return versions | {name: version for name, version in found.items() if version is not None}


PREFIX = "step_"
# megatron-core reads it, where it is, in place of what the manifest vouches for.
_LEGACY_FILE = "common.pt"


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The number of steps in a checkpoint folder's name."""
    return int(path.name.removeprefix(PREFIX))


def damage(
    checkpoint: Path, part: int = 0, num_parts: int = 1, names: list[str] | None = None
) -> str | None:
    """The damage of a checkpoint, in one line that names the file; None if it is sound.

    Of `num_parts` parts only `part` is hashed, so that ranks share the work, and with `names` only
    these files; presence and sizes are always checked for all.
    """
    try:
        digests = _checked_digests(checkpoint)
        for name in sorted(names or digests)[part::num_parts]:
            if file_digest(checkpoint / name) != digests[name]:
                return f"{name} is damaged: its SHA-256 is not that of {MANIFEST_FILE}"
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"
    except ValueError as error:
        return str(error)
    return None


def plain_damage(checkpoint: Path) -> str | None:
    """Same as `damage`, but quick: checks all sizes, and the contents of the configuration."""
    return damage(checkpoint, names=[CONFIG_FILE])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(files: dict[str, tuple[str, int]]) -> bytes:
    """megatron-core's integrity manifest with the files' sizes, which are cheap to check."""
    digests, sizes = ({name: pair[place] for name, pair in files.items()} for place in (0, 1))
    content = {"algorithm": "sha256", "files": digests, "sizes": sizes}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _checked_digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file by the manifest, once all but the contents is checked (ValueError)."""
    if not checkpoint.is_dir():
        raise ValueError("is not a folder")
    there = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
    for name in (FORMAT_FILE, MANIFEST_FILE, CONFIG_FILE):
        if name not in there:
            raise ValueError(f"{name} is missing: the save did not finish")
    if _LEGACY_FILE in there:
        raise ValueError(f"{_LEGACY_FILE} does not belong into this format")
    content = _read_manifest(checkpoint)
    SavedRecord.read(checkpoint)
    files: dict[str, str] = content["files"]
    sizes: dict[str, int] = content.get("sizes", {})
    for name in (TENSORS_FILE, FORMAT_FILE, CONFIG_FILE):
        if name not in files:
            raise ValueError(f"{MANIFEST_FILE} does not vouch for {name}")
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{MANIFEST_FILE} names {name!r}, which is not a file of this folder")
        if name not in there:
            raise ValueError(f"{name} is missing")
        if name in sizes and there[name] != sizes[name]:
            raise ValueError(f"{name} has {there[name]} bytes instead of {sizes[name]}")
    return files


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(checkpoint / MANIFEST_FILE)
        files, sizes = content["files"], content.get("sizes", {})
        is_sound = (
            content["algorithm"] == "sha256"
            and all(isinstance(digest, str) for digest in files.values())
            and all(type(size) is int for size in sizes.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{MANIFEST_FILE} is damaged: it is no SHA-256 manifest")
    return content
