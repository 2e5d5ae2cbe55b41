"""Names of the experts, in the one order that every list over experts uses."""

from collections.abc import Sequence
from dataclasses import dataclass

EXPERT_KINDS = ("FFN", "constant", "copy", "zero")
"""The fixed order: FFN experts, then the zero-computation experts (released MoE++ checkpoints)."""


@dataclass(frozen=True)
class ExpertCounts:
    """How many experts of each kind one MoE++ layer has.

    Attributes:
        ffn: FFN experts (``moe.num_ffn_experts``).
        constant: Constant experts (``moe.num_constant_experts``).
        copy: Copy experts (``moe.num_copy_experts``).
        zero: Zero experts (``moe.num_zero_experts``).
    """

    ffn: int
    constant: int = 0
    copy: int = 0
    zero: int = 0

    @property
    def by_kind(self) -> tuple[int, int, int, int]:
        """Counts in the order of ``EXPERT_KINDS``."""
        return (self.ffn, self.constant, self.copy, self.zero)

    @property
    def total(self) -> int:
        """All experts, E."""
        return sum(self.by_kind)

    @property
    def zero_computation(self) -> int:
        """Zero-computation experts, Z."""
        return self.total - self.ffn

    @property
    def kinds(self) -> list[str]:
        """The kind of each of the E experts."""
        return [k for k, n in zip(EXPERT_KINDS, self.by_kind, strict=True) for _ in range(n)]

    @property
    def names(self) -> list[str]:
        """A name for each of the E experts, such as ``FFN 0`` or ``constant 1``."""
        return [
            f"{k} {i}" for k, n in zip(EXPERT_KINDS, self.by_kind, strict=True) for i in range(n)
        ]

    def ffn_share(self, tau: float) -> float:
        """FFN share of all selections under perfect balance.

        ``phi = tau F / (tau F + Z)``; 1 without zero-computation experts (arXiv 2410.07348, 3.3).
        """
        if self.zero_computation == 0:
            return 1.0
        return tau * self.ffn / (tau * self.ffn + self.zero_computation)


def layer_numbers(known: Sequence[int], count: int) -> Sequence[int]:
    """The numbers of MoE layers: their positions in the model, counted from 1.

    Args:
        known: Numbers of the run's MoE layers.
        count: Number of MoE layers in a record; if there are not as many known numbers, the result
            is 1 to `count`.
    """
    return known if len(known) == count else range(1, count + 1)
