"""Records the calls of the modules, for tests. Transformer Engine has no such thing."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """A forward pass of a module: its class, rows of each GEMM, the recipe's class or None."""

    module: str
    rows: tuple[int, ...]
    recipe: str | None


CALLS = []
