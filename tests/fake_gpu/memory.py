"""Bytes of the tensors that are alive on a GPU that is not there, and the most at one time.

Storages of fake tensors have sizes; each counts from the operation that made it until nothing holds
it. What the allocator rounds up or leaves unused, CUDA's context and NCCL's buffers is not in it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

# So that the parts of a peak are written down once it is this much higher than the last ones.
_NEWS = 1.01


class Memory:
    """Follows storages on the device.

    Attributes:
        live: Bytes now.
        peak: The most since `begin`.
        parts: The largest tensors at about the peak: bytes by shape and dtype.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, tuple[Any, int, str]] = {}
        self.live = 0
        self.begin()

    def begin(self) -> None:
        """Measure the peak from now on."""
        self.peak, self._written = self.live, 0.0
        self.parts: dict[str, int] = {}

    def see(self, result: Any) -> None:
        """Count the storages of tensors that an operation has made or returned."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor)
        if self.live > self.peak:
            self.peak = self.live
            if self.peak > self._written * _NEWS:
                self._write()

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            del self._sizes[key]

        self._sizes[key] = weakref.ref(storage, gone), size, f"{tuple(tensor.shape)} {tensor.dtype}"
        self.live += size

    def _write(self) -> None:
        self._written = self.peak
        found: Counter[str] = Counter()
        for _, size, name in self._sizes.values():
            found[name] += size
        self.parts = dict(found.most_common(25))


MEMORY = Memory()
