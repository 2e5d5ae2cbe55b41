"""Corrections of megatron-core 0.19.2 for optimizer state that is stored per parameter.

Each function says what would go wrong without it, and where.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from moepp_megatron.runtime.patches import replaced

_NO_PARAMETER = "no parameter"


@contextlib.contextmanager
def complete_state(optimizer: Any) -> Iterator[None]:
    """A context in which torch's Adam has the state that megatron-core relies on.

    Torch creates it at the first step, megatron-core needs it before. And a rank without any
    parameter of an optimizer (a stage without experts) has no step count, which
    `DistributedOptimizer.state_dict` asserts.
    """
    inner = optimizer.optimizer
    if inner is None or not is_torch(inner):
        yield
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    if not inner.state:
        inner.state[_NO_PARAMETER] = {"step": torch.tensor(0.0)}
    try:
        yield
    finally:
        inner.state.pop(_NO_PARAMETER, None)


def fill_copies(optimizer: Any, tensors: dict[int, dict[str, Any]]) -> None:
    """Fill fp32 copies that were not stored from the parameters, which have been read."""
    # The order in which the distributed optimizer numbers its parameters.
    parameters = (
        parameter
        for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True)
        for _ in ranges
        for parameter in buffer.param_index_map
    )
    for index, parameter in enumerate(parameters):
        if tensors[index]["param"] is None:
            tensors[index]["param"] = parameter.data


def load_sharded(optimizer: Any, tensors: Any, steps: int) -> None:
    """Load the state of a distributed optimizer over torch's Adam.

    megatron-core 0.19.2 does so only for fused optimizers: it looks for torch's per-parameter step
    among the tensors that were stored, and before that gives all parameters one and the same step
    tensor, which each of them would then count up (distrib_optimizer.py,
    `_set_main_param_and_optimizer_states` and `load_state_dict`).
    """
    states = optimizer.optimizer.state.values()
    for state in states:
        state["step"] = steps  # not a tensor, so it is left alone
    optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for state in states:
        state["step"] = torch.tensor(float(steps))


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """A context in which the distributed optimizer does not run the garbage collector.

    It does so for runs that switched the collector off; here that would be a third of the time
    that a save keeps training (docs/LOG.md).
    """
    with replaced(distrib_optimizer, gc=SimpleNamespace(collect=lambda: 0)):
        yield


@contextlib.contextmanager
def padded_state(optimizer: Any) -> Iterator[None]:
    """A context in which a distributed optimizer reads its parameters at the right offsets.

    It gathers its state without the padding between the buckets of a buffer, but cuts the
    parameters out at their places with padding (distrib_optimizer.py,
    `get_parameter_state_dp_zero` and `sharded_param_state_fully_reshardable`): from the second
    bucket on, tied embeddings for one, parameters would be stored with their neighbours' state.
    """
    if not hasattr(optimizer, "gbuf_ranges"):
        yield
        return
    gather = optimizer.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        for index, buffer in enumerate(optimizer.buffers if state is not None else ()):
            for tensors in state[index].values():
                for key, value in tensors.items():
                    if isinstance(value, Tensor):
                        tensors[key] = _with_padding(value, buffer)
        return state

    with replaced(optimizer, get_parameter_state_dp_zero=gather_with_padding):
        yield


def _with_padding(packed: Tensor, buffer: Any) -> Tensor:
    if len(buffer.buckets) == 1:
        return packed
    padded = packed.new_zeros(buffer.numel)
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    for bucket, content in zip(buffer.buckets, packed.split(sizes), strict=True):
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = content
    return padded


def is_torch(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is torch's own, as without Transformer Engine and apex."""
    return type(inner).__module__.startswith("torch.optim")
