"""The gradient norm before the optimizer acts, without computing it twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer

from moepp_megatron.runtime.patches import replaced


def prepare_gradients(optimizer: MegatronOptimizer) -> float:
    """First half of `optimizer.step()`: gradients in place, their global norm; no state changes."""
    assert isinstance(optimizer, ChainedOptimizer), f"{type(optimizer)} is not chained"
    found_inf = optimizer.prepare_grads()
    return float("inf") if found_inf else float(optimizer.get_grad_norm())


@contextmanager
def gradients_ready(optimizer: MegatronOptimizer, grad_norm: float) -> Iterator[None]:
    """Within it, `optimizer.step()` goes on from `prepare_gradients`.

    `ChainedOptimizer.step` calls these two methods first; what they would compute again (one pass
    over all gradients and an all-reduce) is known.
    """
    with replaced(optimizer, prepare_grads=lambda: False, get_grad_norm=lambda: grad_norm):
        yield
