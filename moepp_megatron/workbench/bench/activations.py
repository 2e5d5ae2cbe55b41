"""Measures the memory that a layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, parameters left out.

    Args:
        forward: Runs the forward pass; its result is freed without a backward pass.
        parameters: The layer's parameters, which are not counted.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    # Held until the end: a freed address could be taken again and be counted as the same.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
