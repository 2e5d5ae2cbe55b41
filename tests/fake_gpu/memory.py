"""Bytes of the tensors that are alive on a GPU that is not there, and the most at one time.

Storages of fake tensors have sizes; each counts from the operation that made it until nothing holds
it. What the allocator rounds up or leaves unused, CUDA's context and NCCL's buffers is not in it.
"""

import weakref
from collections import Counter

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

    def __init__(self):
        self.forget()

    def forget(self):
        """Count what is made from now on."""
        # Of each storage by its id: a reference, bytes, shape and dtype.
        self._known = {}
        self.live = 0
        self.begin()

    def begin(self):
        """Measure the peak from now on."""
        self.peak, self._written = self.live, 0.0
        self.parts = {}

    def see(self, result):
        """Count the storages of tensors that an operation has made or returned."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._add(tensor)
        if self.live > self.peak:
            self.peak = self.live
            if self.peak > self._written * _NEWS:
                self._write()

    def resized(self, storage):
        """Count what a storage that was freed or made again below its tensors has now."""
        known = self._known.get(id(storage))
        if known is not None:
            reference, before, name = known
            self._known[id(storage)] = reference, storage.nbytes(), name
            self.live += storage.nbytes() - before

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return

        def gone(_):
            self.live -= self._known.pop(key)[1]

        name = f"{tuple(tensor.shape)} {tensor.dtype}"
        self._known[key] = weakref.ref(storage, gone), storage.nbytes(), name
        self.live += storage.nbytes()

    def _write(self):
        self._written = self.peak
        found = Counter()
        for _, size, name in self._known.values():
            found[name] += size
        self.parts = dict(found.most_common(25))


MEMORY = Memory()
