"""The gradient norm before the optimizer acts, without computing it twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer


def prepare_gradients(optimizer: MegatronOptimizer) -> float:
    """First half of `optimizer.step()`: gradients in place, their global norm; no state changes."""
    assert isinstance(optimizer, ChainedOptimizer), f"{type(optimizer)} is not chained"
    found_inf = optimizer.prepare_grads()
    return float("inf") if found_inf else float(optimizer.get_grad_norm())


@contextmanager
def gradients_ready(optimizer: MegatronOptimizer, grad_norm: float) -> Iterator[None]:
    """A context in which `optimizer.step()` continues from `prepare_gradients`.

    `ChainedOptimizer.step` calls these two methods first; their result, which takes one pass
    over all gradients and an all-reduce, is reused.
    """
    # setattr: mypy would see methods overwritten, which is what happens, for this call alone.
    setattr(optimizer, "prepare_grads", lambda: False)  # noqa: B010
    setattr(optimizer, "get_grad_norm", lambda: grad_norm)  # noqa: B010
    try:
        yield
    finally:
        del optimizer.prepare_grads, optimizer.get_grad_norm
