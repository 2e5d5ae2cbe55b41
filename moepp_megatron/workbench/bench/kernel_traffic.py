"""Bytes that the kernels must move: the bound that their time is compared with.

Each operand is counted once, since no cache can save it. Partial sums (under a tenth), V, and
repeated reads from the cache are not counted.
"""

from __future__ import annotations

from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes of one kernel.

    Attributes:
        read: Bytes read.
        written: Bytes written.
    """

    read: int
    written: int

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return self.read + self.written


def router_forward(num_tokens: int, num_experts: int) -> Traffic:
    """Traffic of `kernels.router.select`: logits in; gates (fp32) and map (1 byte) out."""
    entries = num_tokens * num_experts
    return Traffic(4 * entries, 5 * entries)


def router_backward(num_tokens: int, num_experts: int) -> Traffic:
    """Traffic of its backward pass: logits, map and gates' gradient in, logits' gradient out."""
    entries = num_tokens * num_experts
    return Traffic(9 * entries, 4 * entries)


def combine_forward(
    num_tokens: int,
    num_rows: int,
    hidden: int,
    element_size: int,
    *,
    num_experts: int,
    slots: int,
    num_used: int,
    num_copies: int,
    num_constants: int,
    has_addend: bool = False,
) -> Traffic:
    """Traffic of `kernels.combine.combine`.

    Args:
        num_tokens: T.
        num_rows: R, FFN experts' rows; about phi K T.
        hidden: D.
        element_size: Bytes of an element of the activations.
        num_experts: E.
        slots: Entries of the row table for each token, 4 bytes each.
        num_used: Tokens that selected a copy or constant expert; x is read for them alone.
        num_copies: Copy experts.
        num_constants: C.
        has_addend: Whether shared experts' output is added.

    Returns:
        Reads of rows, x, addend, row table, gates and map of copy and constant experts, mixing
        logits; writes of the output.
    """
    vectors = num_rows + num_used + (num_tokens if has_addend else 0)
    small = num_tokens * (4 * slots + 5 * (num_copies + num_constants) + 8 * num_constants)
    row = hidden * element_size
    return Traffic(vectors * row + small, num_tokens * row)


def combine_backward(
    num_tokens: int,
    num_rows: int,
    hidden: int,
    element_size: int,
    *,
    num_experts: int,
    slots: int,
    num_used: int,
    num_copies: int,
    num_constants: int,
) -> Traffic:
    """Traffic of its backward pass, both kernels; arguments as for `combine_forward`.

    The output's gradient is the addend's too, so that one costs nothing.

    Returns:
        Reads of the output's gradient, x, and what `combine_forward` reads besides vectors; writes
        of the gradients of rows, x, gates and mixing logits.
    """
    row = hidden * element_size
    small = num_tokens * (4 * slots + 5 * (num_copies + num_constants) + 8 * num_constants)
    written = num_tokens * (4 * num_experts + 8 * num_constants)
    return Traffic((num_tokens + num_used) * row + small, (num_rows + num_tokens) * row + written)
