"""Expert usage: how often each expert is selected, and FFN experts by kind of token.

Usage is held as counts, so it adds up: of steps to a window's, of windows to a reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ExpertUsage:
    """The selections of all MoE layers' routers for some tokens.

    Attributes:
        experts: [L, E] int64 selections of each expert in each MoE layer.
        cells: [L, C, 2] int64 FFN selections and tokens of each cell, a range of positions with a
            class of token ids by their frequency; C is 0 where layers do not know their tokens.
    """

    experts: Counts
    cells: Counts

    def __add__(self, other: ExpertUsage) -> ExpertUsage:
        """The usage of the tokens of both; shapes must be the same."""
        return ExpertUsage(self.experts + other.experts, self.cells + other.cells)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of `experts` and `cells`; usage of other shapes cannot be compared."""
        return self.experts.shape, self.cells.shape

    def expert_share(self) -> NDArray[np.float64]:
        """[L, E] share of each expert in its layer's selections; 0 where nothing was counted."""
        return _ratio(self.experts, self.experts.sum(axis=1, keepdims=True))

    def ffn_per_token(self) -> NDArray[np.float64]:
        """[L, C] FFN experts per token in each cell; 0 in a cell without tokens."""
        return _ratio(self.cells[..., 0], self.cells[..., 1])

    def selections_by_cell(self) -> NDArray[np.float64]:
        """[L, C] selections of each cell's tokens: all tokens make equally many."""
        tokens = self.cells[..., 1]
        topk = _ratio(self.experts.sum(axis=1, keepdims=True), tokens.sum(axis=1, keepdims=True))
        return topk * tokens

    def as_json(self) -> dict[str, Any]:
        """The usage as JSON, for `from_json`."""
        return {"experts": self.experts.tolist(), "cells": self.cells.tolist()}

    @classmethod
    def from_json(cls, values: Any) -> ExpertUsage:
        """Undo `as_json`.

        Raises:
            ValueError: If it is not a result of `as_json`; names the part and the error.
        """
        if not isinstance(values, dict):
            raise ValueError("it is no object with experts and cells")
        experts = _counts(values, "experts", 2)
        layers = experts.shape[0]
        # Without cells JSON has no third dimension.
        is_empty = values.get("cells") == [[]] * layers
        empty = np.zeros((layers, 0, 2), dtype=np.int64)
        cells = empty if is_empty else _counts(values, "cells", 3)
        if cells.shape[0] != layers or cells.shape[2] != 2:
            raise ValueError(
                f"cells has the shape {list(cells.shape)}, which must be [{layers}, cells, 2]"
            )
        return cls(experts, cells)


def difference(usage: ExpertUsage, reference: ExpertUsage) -> NDArray[np.float64]:
    """Differences in usage, in units of their standard deviation by chance.

    For each layer: the square roots of the experts' shares, and the angles `arcsin sqrt f` of the
    share f of FFN experts in each cell's selections. These are the coordinates in which the sum of
    squares is twice the squared Hellinger distance (for angles, where it is small), and in which
    the standard deviation of a sample of n is `1 / (2 sqrt n)` whatever the shares are; so that the
    difference of two samples of n and m independent selections, divided by
    `sqrt(1/n + 1/m) / 2`, has the standard deviation 1 (a little less: shares add up to 1).
    A cell that is empty on one side gives 0. Real tokens come in texts and are not
    independent; their differences are larger, but as large for windows of other sizes.

    Returns:
        [L (E + C)] float64, layer by layer.

    Raises:
        ValueError: If the shapes differ.
    """
    if usage.shapes != reference.shapes:
        raise ValueError(f"usage of shapes {usage.shapes} and {reference.shapes} differ")
    of_experts = np.sqrt(usage.expert_share()) - np.sqrt(reference.expert_share())
    sizes = [each.experts.sum(axis=1, keepdims=True) for each in (usage, reference)]
    of_experts *= _weight(*sizes)
    of_cells = _ffn_angle(usage) - _ffn_angle(reference)
    of_cells *= _weight(*(each.selections_by_cell() for each in (usage, reference)))
    return np.concatenate([of_experts, of_cells], axis=1).ravel()


def _weight(n: NDArray[Any], m: NDArray[Any]) -> NDArray[np.float64]:
    """`2 / sqrt(1/n + 1/m)`, 0 where n or m is."""
    # Not `n * m`, which may be beyond int64.
    return 2 * np.sqrt(_ratio(n, n + m) * m)


def _ffn_angle(usage: ExpertUsage) -> NDArray[np.float64]:
    share = _ratio(usage.cells[..., 0], usage.selections_by_cell())
    return np.arcsin(np.sqrt(np.minimum(share, 1.0)))


def _ratio(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """`part / whole`, 0 where `whole` is."""
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole != 0)


def _counts(values: dict[str, Any], name: str, dimensions: int) -> Counts:
    try:
        made = np.asarray(values[name])
    except KeyError:
        raise ValueError(f"{name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{name} is not an array with {dimensions} dimensions") from error
    # An array without numbers, of no cells, is of floats.
    is_whole = made.size == 0 or made.dtype == np.int64
    if made.ndim != dimensions or not is_whole or (made < 0).any():
        raise ValueError(f"{name} is not an array of counts with {dimensions} dimensions")
    return made.astype(np.int64)
