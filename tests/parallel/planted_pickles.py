"""Checkpoints with a pickle in them that would run code, as an attacker would plant it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any


class Bomb:
    """Unpickled, it makes the file `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def plant(checkpoint: Path, name: str, exploded: Path) -> None:
    """Put a pickle into `.metadata` or a file of tensors, and have the manifest vouch for it."""
    path = checkpoint / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(Bomb(exploded)))
    else:
        _plant_entry(checkpoint, path, Bomb(exploded))
        _vouch(checkpoint, ".metadata")
    _vouch(checkpoint, name)


def _plant_entry(checkpoint: Path, path: Path, bomb: Bomb) -> None:
    """Append a pickled object and let the common state's entry point to it."""
    import torch

    content = io.BytesIO()
    torch.save([bomb], content)
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + content.getvalue())
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn.startswith("common_state"):
            info.relative_path, info.offset = path.name, offset
            info.length = len(content.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _vouch(checkpoint: Path, name: str) -> None:
    from moepp_megatron.training.checkpoint.validity import file_digest

    path = checkpoint / name
    manifest = json.loads((checkpoint / "integrity.json").read_bytes())
    manifest["files"][name] = file_digest(path)
    manifest["sizes"][name] = path.stat().st_size
    (checkpoint / "integrity.json").write_text(json.dumps(manifest))
