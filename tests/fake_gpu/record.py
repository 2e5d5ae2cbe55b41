"""Records a played step; answers it with balanced routing."""

import sys
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Record:
    """The events since the last `clear`.

    Attributes:
        reads: What made the host wait for the device, "kind file:function", by how often.
        launches: Triton kernels by name.
        collectives: By name.
        operations: Operations of torch that start at least one kernel, by name.
        owners: Kernels of both by whose code starts them (`owner`).
        faults: What would fail or be wrong on a GPU.
    """

    reads: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    owners: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def clear(self):
        """Forget everything but faults."""
        for value in vars(self).values():
            if isinstance(value, Counter):
                value.clear()

    @property
    def kernels(self):
        """Kernels of Triton, and one for each operation of torch."""
        return self.operations.total() + self.launches.total()

    def read(self, kind):
        self.reads[f"{kind} {place()}"] += 1


RECORD = Record()


@dataclass
class Routing:
    """Balanced routing: every FFN expert gets `share` of a rank's tokens.

    Attributes:
        share: Selections of one FFN expert over the tokens.
        tokens: Tokens of a rank in a micro-batch.
        experts: FFN experts of the model.
        ranks: Expert-parallel ranks.
        sources: Ranks whose tokens an expert gets: these times expert-tensor-parallel ranks.
        reached: Expert-parallel ranks on which a token's FFN experts lie.
        gathers: Whether rows are counted once they have arrived: all-gather and flex.
    """

    share: float = 0.0
    tokens: int = 0
    experts: int = 1
    ranks: int = 1
    sources: int = 1
    reached: float = 1.0
    gathers: bool = False

    @property
    def counted(self):
        """Rows that a dispatcher counts: those that it sends, or those that have arrived."""
        if self.gathers:
            return self.rows * self.sources * self.local_experts
        return self.rows * self.experts

    @property
    def rows(self):
        """Rows that one expert gets from one rank."""
        return max(1, int(self.share * self.tokens))

    @property
    def copies(self):
        """Copies that one rank gets from another where a token is sent to a rank once."""
        return max(1, int(self.reached * self.tokens / self.ranks))

    @property
    def local_experts(self):
        return self.experts // self.ranks


ROUTING = Routing()


def place(packages=("/moepp_megatron/", "/megatron/core/")):
    """The innermost function of megatron-core or of this package, "file:function"."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        for package in packages:
            if package in name:
                return f"{package[1:]}{name.split(package)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


# Whose code starts a kernel, by the folder of the innermost function.
OWNERS = {
    "/moepp_megatron/": "this package",
    "/megatron/core/": "megatron-core",
    "/transformer_engine/": "Transformer Engine",
}


def owner():
    """Whose code runs; torch's autograd where a backward pass runs no code in Python."""
    found = "/" + place(tuple(OWNERS))
    return next((name for folder, name in OWNERS.items() if found.startswith(folder)), "autograd")
