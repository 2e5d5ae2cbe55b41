"""Texts of this machine as bytes, and sequences from anywhere in them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch


def text_of(kind: str) -> np.ndarray:
    """[bytes] uint8."""
    if kind == "prose":
        from pydoc_data.topics import topics

        return np.frombuffer("\n".join(topics[key] for key in sorted(topics)).encode(), np.uint8)
    if kind == "code":
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        return np.frombuffer(b"\n".join(path.read_bytes() for path in sources), np.uint8)
    return np.random.default_rng(0).integers(256, size=1 << 20).astype(np.uint8)


class Sequences:
    """From anywhere in a text, by index and seed."""

    def __init__(self, kind: str, length: int, seed: int) -> None:
        self._text, self._length, self._seed = text_of(kind), length, seed

    def __len__(self) -> int:
        """More than any run reads."""
        return 100_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Depends only on the index."""
        chance = np.random.default_rng([self._seed, index])
        start = int(chance.integers(len(self._text) - self._length))
        tokens = torch.from_numpy(self._text[start : start + self._length + 1].astype(np.int64))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(self._length),
            "position_ids": torch.arange(self._length),
        }
