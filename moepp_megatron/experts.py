"""The experts of a layer: their kinds, their order, how many there are, what they cost.

The only source of experts' numbers, order, names and costs. Imports no torch and nothing of this
package.

A new kind is a class and a name in `KINDS` below, a field of `ExpertCounts`, and what it computes
(`moe/reference.py`, `moe/zero_computation.py`, `moe/kernels`).

Symbols: F FFN experts, Z the others, E = F + Z, D hidden size, H inner width of an FFN expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Any, ClassVar

Shape = tuple[int, ...]
_MOST_EXPERTS = 65_536
"""Limit for one kind: far above any model, yet a list of their names fits in memory."""
_GATE_WIDTH = 8
"""Hidden width of a two-layer gate, in units of E (released MoE++ model)."""


class ExpertKind:
    """The common properties of all experts of a kind.

    Attributes:
        name: Its name for readers.
        description: Description of the setting that gives their number.
        is_local: Whether it is computed where the token is: one of the zero-computation experts,
            which every rank holds whole. Others are sent tokens, from rank to rank.
        has_kernel: Whether `moe/kernels/combine.py` computes it where it is local. A layer that has
            experts of a kind without does not use that kernel.
        shareable: Weights that all layers may have in common (`constants_shared`).
    """

    name: str
    description: str
    is_local = True
    has_kernel = False
    shareable: frozenset[str] = frozenset()

    @property
    def setting(self) -> str:
        """The setting that says how many there are."""
        return f"num_{self.name.lower()}_experts"

    def weights(self, hidden: int, inner: int) -> dict[str, Shape]:
        """Shapes of one expert's weights, by name; `inner` is the width of an FFN expert."""
        return {}

    def matmuls(self, count: int, hidden: int, inner: int) -> list[tuple[int, int]]:
        """Outputs and inputs of the products that `count` experts together multiply a token by."""
        return []

    def parameters(self, hidden: int, inner: int) -> int:
        """Parameters of one expert."""
        return sum(map(prod, self.weights(hidden, inner).values()))

    def flops(self, hidden: int, inner: int) -> int:
        """FLOP of one expert's forward pass of one token, 2 for each weight it is multiplied by."""
        return 2 * sum(map(prod, self.matmuls(1, hidden, inner)))


class _FFN(ExpertKind):
    name = "FFN"
    description = "FFN experts F"
    is_local = False

    def weights(self, hidden: int, inner: int) -> dict[str, Shape]:
        return {"linear_fc1.weight": (2 * inner, hidden), "linear_fc2.weight": (hidden, inner)}

    def matmuls(self, count: int, hidden: int, inner: int) -> list[tuple[int, int]]:
        return [(count * 2 * inner, hidden), (hidden, count * inner)]


class _Constant(ExpertKind):
    name = "constant"
    description = "Experts that mix their input with a learned vector"
    has_kernel = True
    shareable = frozenset({"constants"})

    def weights(self, hidden: int, inner: int) -> dict[str, Shape]:
        return {"constants": (hidden,), "mixing_weight": (2, hidden)}

    def matmuls(self, count: int, hidden: int, inner: int) -> list[tuple[int, int]]:
        return [(2 * count, hidden), (hidden, count)]


class _Copy(ExpertKind):
    name = "copy"
    description = "Experts that return their input"
    has_kernel = True


class _Zero(ExpertKind):
    name = "zero"
    description = "Experts that return 0"
    has_kernel = True


FFN, CONSTANT, COPY, ZERO = _FFN(), _Constant(), _Copy(), _Zero()
# The one order: in router rows, logits, gates, statistics and checkpoints (released MoE++). FFN
# experts come first and zero experts last, so that one comparison finds either.
KINDS: tuple[ExpertKind, ...] = (FFN, CONSTANT, COPY, ZERO)
LOCAL_KINDS = tuple(kind for kind in KINDS if kind.is_local)
KIND_NAMES = tuple(kind.name for kind in KINDS)
FFN_ONLY: Mapping[str, Any] = {kind.setting: 0 for kind in LOCAL_KINDS}
"""Settings of a layer without zero-computation experts."""
LOCAL_COUNTS = " + ".join(f"moe.{kind.setting}" for kind in LOCAL_KINDS)
"""Number of zero-computation experts, for messages."""


@dataclass(frozen=True)
class Setting:
    """Description of a layer setting, in its field's annotation.

    Attributes:
        unit: The unit, as in `config.schema.section`.
        description: Its meaning in one line, for help and documentation.
        exported: Whether an exported model has it under the same name.
        extension: Whether the vanilla baseline, and an export that does not name it, have its
            default.
        kind: The kind of experts that it belongs to, without which it has no effect.
        gt: Its values are above this, and likewise `ge` and `le`.
    """

    unit: str
    description: str
    exported: bool = False
    extension: bool = False
    kind: ExpertKind | None = None
    gt: float | None = None
    ge: float | None = None
    le: float | None = None

    # By this mark and `__iter__` pydantic finds the bounds (annotated_types.GroupedMetadata).
    __is_annotated_types_grouped_metadata__: ClassVar = True

    def __iter__(self) -> Iterator[Any]:
        """Yield the bounds, for pydantic."""
        from annotated_types import Interval

        return iter(Interval(gt=self.gt, ge=self.ge, le=self.le))


def _count(kind: ExpertKind, least: int = 0) -> Setting:
    return Setting("experts", kind.description, exported=True, ge=least, le=_MOST_EXPERTS)


# Kinds have no order that a caller would guess, so only the first count goes without its name.
@dataclass(frozen=True, kw_only=True)
class ExpertCounts:
    """Number of experts of each kind in a layer; a field for each of `KINDS`, in their order."""

    num_ffn_experts: Annotated[int, _count(FFN, 1)] = field(default=8, kw_only=False)
    num_constant_experts: Annotated[int, _count(CONSTANT)] = 2
    num_copy_experts: Annotated[int, _count(COPY)] = 1
    num_zero_experts: Annotated[int, _count(ZERO)] = 1

    def count(self, kind: ExpertKind) -> int:
        """Experts of a kind."""
        return int(getattr(self, kind.setting))

    @property
    def counts(self) -> ExpertCounts:
        """Return only the counts."""
        return ExpertCounts(**{kind.setting: self.count(kind) for kind in KINDS})

    @property
    def by_kind(self) -> tuple[int, ...]:
        """Counts in the order of `KINDS`."""
        return tuple(map(self.count, KINDS))

    @property
    def num_zero_computation_experts(self) -> int:
        """Z, the experts that need no FFN."""
        return sum(map(self.count, LOCAL_KINDS))

    @property
    def have_kernels(self) -> bool:
        """True if a kernel computes all zero-computation experts that there are."""
        return all(kind.has_kernel for kind in LOCAL_KINDS if self.count(kind))

    @property
    def num_experts(self) -> int:
        """E = F + Z, the experts that the router chooses from."""
        return sum(self.by_kind)

    @property
    def kinds(self) -> list[str]:
        """The kind of each of the E experts, by its name."""
        return [kind.name for kind in KINDS for _ in range(self.count(kind))]

    @property
    def names(self) -> list[str]:
        """A name for each of the E experts, such as `FFN 0` or `constant 1`."""
        return [f"{kind.name} {i}" for kind in KINDS for i in range(self.count(kind))]

    @property
    def summary(self) -> str:
        """Describe the counts, such as `8 FFN + 2 constant`, without absent kinds."""
        present = (kind for kind in KINDS if self.count(kind))
        return " + ".join(f"{self.count(kind)} {kind.name}" for kind in present)

    def columns(self, kind: ExpertKind) -> slice:
        """Columns of a kind's experts among all experts."""
        start = sum(map(self.count, KINDS[: KINDS.index(kind)]))
        return slice(start, start + self.count(kind))

    def phi(self, tau: float) -> float:
        """The share of selections that perfect balance under `tau` sends to FFN experts.

        `phi = tau F / (tau F + Z)` (arXiv 2410.07348, 3.3).
        """
        weight = tau * self.num_ffn_experts
        return weight / (weight + self.num_zero_computation_experts)

    def tau_for(self, share: float) -> float:
        """The tau under which `phi` is `share`, which is below 1."""
        return share * self.num_zero_computation_experts / (self.num_ffn_experts * (1.0 - share))


@dataclass(frozen=True, kw_only=True)
class ExpertLayout(ExpertCounts):
    """The experts of a layer and its router: all that their weights and work depend on."""

    router_topk: Annotated[
        int, Setting("experts", "Experts selected per token, K", ge=1, le=_MOST_EXPERTS)
    ] = 2
    gating_residual: Annotated[
        bool,
        Setting(
            "-",
            "Add a learned map of the previous MoE layer's logits to the router's",
            exported=True,
        ),
    ] = True
    two_layer_gate: Annotated[
        bool,
        Setting(
            "-",
            "Router W_b tanh(W_a x) with hidden width 8E, as in the released model",
            exported=True,
            extension=True,
        ),
    ] = False
    constants_shared: Annotated[
        bool,
        Setting(
            "-",
            "All MoE layers have the same vectors of constant experts",
            extension=True,
            kind=CONSTANT,
        ),
    ] = False

    @property
    def is_vanilla(self) -> bool:
        """True for megatron-core's own MoE: no zero-computation expert, no gating residual."""
        return self.num_zero_computation_experts == 0 and not self.gating_residual

    @property
    def vanilla(self) -> ExpertLayout:
        """The layout of megatron-core's own layer of the same FFN experts."""
        return ExpertLayout(
            self.num_ffn_experts, router_topk=self.router_topk, gating_residual=False, **FFN_ONLY
        )

    @property
    def shares_constants(self) -> bool:
        """True if there are constant experts that share the first layer's vectors."""
        return self.constants_shared and self.num_constant_experts > 0

    def gate_shapes(self, hidden: int) -> list[tuple[int, int]]:
        """The gate's weights: W [E, D], or W_a [8E, D] and W_b [E, 8E] of two layers."""
        experts = self.num_experts
        if not self.two_layer_gate:
            return [(experts, hidden)]
        return [(_GATE_WIDTH * experts, hidden), (experts, _GATE_WIDTH * experts)]

    def router_shapes(self, hidden: int, *, is_first: bool) -> list[tuple[int, int]]:
        """The gate's weights and G [E, E] of the gating residual, which the first layer lacks."""
        shapes = self.gate_shapes(hidden)
        if self.gating_residual and not is_first:
            shapes.append((self.num_experts, self.num_experts))
        return shapes

    def router_parameters(self, hidden: int, *, is_first: bool) -> int:
        """Parameters of one layer's router; its forward pass is twice as many FLOP per token."""
        return sum(map(prod, self.router_shapes(hidden, is_first=is_first)))

    def local_weights(self, hidden: int) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each weight of the zero-computation experts, all of a kind in one."""
        for kind in LOCAL_KINDS:
            if self.count(kind):
                for name, shape in kind.weights(hidden, 0).items():
                    yield name, (self.count(kind), *shape)

    def local_parameters(self, hidden: int, *, is_first: bool) -> int:
        """Parameters of one layer's zero-computation experts, without what it has of the first."""
        shared = frozenset().union(*(kind.shareable for kind in LOCAL_KINDS))
        left_out = shared if self.constants_shared and not is_first else frozenset()
        weights = self.local_weights(hidden)
        return sum(prod(shape) for name, shape in weights if name not in left_out)

    def local_matmuls(self, hidden: int) -> list[tuple[int, int]]:
        """Outputs and inputs of the products of the zero-computation experts."""
        return [
            matmul
            for kind in LOCAL_KINDS
            if self.count(kind)
            for matmul in kind.matmuls(self.count(kind), hidden, 0)
        ]

    def local_flops(self, hidden: int) -> int:
        """FLOP of a token's zero-computation experts, forward, as if every token took them all.

        Their products, and the scale of the input: `y = s x + A V`.
        """
        if self.num_zero_computation_experts == 0:
            return 0
        return 2 * hidden + 2 * sum(map(prod, self.local_matmuls(hidden)))
