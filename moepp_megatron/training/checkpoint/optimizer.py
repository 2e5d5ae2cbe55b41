"""State and step count of megatron-core's optimizers, where a checkpoint needs them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def complete_state(optimizer: Any) -> None:
    """Create the state that an optimizer makes at its first step.

    It is zeros, and where the optimizer keeps the fp32 weights, these. megatron-core 0.19.2 relies
    on it before, and the distributed optimizer reads values into it.

    Args:
        optimizer: One of megatron-core's, not a chain of them.
    """
    inner = optimizer.optimizer
    if inner is None:  # a rank without parameters of this optimizer
        return
    if is_torch(inner):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
    elif is_emerging(inner):
        optimizer.init_state_fn(inner, optimizer.config)
    elif optimizer.config.use_precision_aware_optimizer:
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.initialize_state(parameter, optimizer.config.store_param_remainders)
    elif not inner.state and is_distributed(optimizer):
        # It makes room for the state that it is to load, and leaves the values open.
        optimizer.load_state_dict(optimizer.state_dict())
        for state in inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


def optimizer_steps(optimizers: list[Any]) -> int:
    """Steps that optimizers have taken; fewer than the run's where some were skipped.

    Every rank must call: one may hold only parameters of an optimizer that does not count.
    """
    steps = torch.tensor(_own_steps(optimizers), device=torch.cuda.current_device())
    dist.all_reduce(steps, op=dist.ReduceOp.MAX)
    return int(steps)


def _own_steps(optimizers: list[Any]) -> int:
    for inner in (each.optimizer for each in optimizers if each.optimizer):
        for entry in inner.state.values():
            if "step" in entry:  # torch's Adam counts per parameter
                return int(entry["step"])
        for group in inner.param_groups:
            if "step" in group and group["params"]:  # fused Adam counts per group
                return int(group["step"])
    return 0


def set_steps(optimizer: Any, steps: int) -> None:
    """Set the count of one optimizer's steps, where its class looks for it."""
    inner = optimizer.optimizer
    if inner is None:
        return
    if is_torch(inner):
        for state in inner.state.values():
            state["step"] = torch.tensor(float(steps))
        return
    for group in inner.param_groups:
        group["step"] = steps


def is_distributed(optimizer: Any) -> bool:
    """Whether an optimizer keeps a shard of its state on each data-parallel rank."""
    return hasattr(optimizer, "gbuf_ranges")


def is_torch(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is torch's own, as without Transformer Engine and apex."""
    return type(inner).__module__.startswith("torch.optim")


def is_emerging(inner: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of the package emerging_optimizers, or megatron-core's of it."""
    return "emerging_optimizers" in type(inner).__module__
