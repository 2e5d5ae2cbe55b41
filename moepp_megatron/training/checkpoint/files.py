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

Reads bytes only; unpickles nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import read_json
from moepp_megatron.file_names import CONFIG_FILE, FORMAT_FILE, MANIFEST_FILE, TENSORS_FILE
from moepp_megatron.training.checkpoint.progress import read_record

PREFIX = "step_"
# megatron-core reads it, where it is, in place of what the manifest vouches for.
_LEGACY_FILE = "common.pt"


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The number of steps in a checkpoint folder's name."""
    return int(path.name.removeprefix(PREFIX))


def is_checkpoint(path: Path) -> bool:
    """True if `path` has all files of a checkpoint; `damage` checks their contents."""
    return all((path / name).is_file() for name in (FORMAT_FILE, CONFIG_FILE, MANIFEST_FILE))


def damage(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """The damage of a checkpoint, in one line that names the file; None if it is sound.

    Of `num_parts` parts only `part` is hashed, so that ranks share the work; presence and sizes are
    always checked for all.
    """
    return _damage(checkpoint, None, part, num_parts)


def plain_damage(checkpoint: Path) -> str | None:
    """Same as `damage`, but quick: checks all sizes, and the contents of the configuration."""
    return _damage(checkpoint, [CONFIG_FILE])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(digests: dict[str, str], sizes: dict[str, int]) -> bytes:
    """megatron-core's integrity manifest with the files' sizes, which are cheap to check."""
    content = {"algorithm": "sha256", "files": digests, "sizes": sizes}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _damage(
    checkpoint: Path, names: list[str] | None, part: int = 0, num_parts: int = 1
) -> str | None:
    try:
        return _structure(checkpoint) or _contents(checkpoint, names, part, num_parts)
    except OSError as error:
        return f"{error.filename or checkpoint}: {error.strerror}"


def _structure(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return "is not a folder"
    there = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
    for name in (FORMAT_FILE, MANIFEST_FILE, CONFIG_FILE):
        if name not in there:
            return f"{name} is missing: the save did not finish"
    if _LEGACY_FILE in there:
        return f"{_LEGACY_FILE} does not belong into this format"
    try:
        content = _read_manifest(checkpoint)
        read_record(checkpoint)
    except ValueError as error:
        return str(error)
    files: dict[str, str] = content["files"]
    sizes: dict[str, int] = content.get("sizes", {})
    for name in (TENSORS_FILE, FORMAT_FILE, CONFIG_FILE):
        if name not in files:
            return f"{MANIFEST_FILE} does not vouch for {name}"
    for name in files:
        if Path(name).name != name:
            return f"{MANIFEST_FILE} names {name!r}, which is not a file of this folder"
        if name not in there:
            return f"{name} is missing"
        if name in sizes and there[name] != sizes[name]:
            return f"{name} has {there[name]} bytes instead of {sizes[name]}"
    return None


def _contents(checkpoint: Path, names: list[str] | None, part: int, num_parts: int) -> str | None:
    digests: dict[str, str] = _read_manifest(checkpoint)["files"]
    for name in (sorted(digests) if names is None else names)[part::num_parts]:
        if file_digest(checkpoint / name) != digests[name]:
            return f"{name} is damaged: its SHA-256 is not that of {MANIFEST_FILE}"
    return None


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
