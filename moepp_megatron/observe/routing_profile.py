"""The routing profile: how much each expert is used, and how many FFN experts which tokens take.

Counts, so profiles add up: over steps to those of a window, over windows to that of a reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RoutingProfile:
    """What the routers of all MoE layers wanted for some tokens.

    Attributes:
        experts: [L, E] int64 selections of each expert in each MoE layer.
        cells: [L, C, 2] int64 FFN selections and tokens of each cell, a range of positions with a
            class of token ids by their frequency; C is 0 where layers do not know their tokens.
    """

    experts: Counts
    cells: Counts

    def __add__(self, other: RoutingProfile) -> RoutingProfile:
        """The profile of the tokens of both; shapes must be the same."""
        return RoutingProfile(self.experts + other.experts, self.cells + other.cells)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of `experts` and `cells`; profiles of other shapes do not compare."""
        return self.experts.shape, self.cells.shape

    def expert_share(self) -> NDArray[np.float64]:
        """[L, E] share of each expert in its layer's selections; 0 where nothing was counted."""
        return _ratio(self.experts, self.experts.sum(axis=1, keepdims=True))

    def ffn_per_token(self) -> NDArray[np.float64]:
        """[L, C] FFN experts that a token of each cell takes; 0 in a cell without tokens."""
        return _ratio(self.cells[..., 0], self.cells[..., 1])

    def as_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return {"experts": self.experts.tolist(), "cells": self.cells.tolist()}

    @classmethod
    def from_json(cls, values: Any) -> RoutingProfile:
        """Undo `as_json`.

        Raises:
            ValueError: It is not what `as_json` makes: which part, and what is wrong with it.
        """
        if not isinstance(values, dict):
            raise ValueError("it is no object with experts and cells")
        experts = _counts(values, "experts", 2)
        cells = _counts(values, "cells", 3)
        layers = experts.shape[0]
        if cells.shape[0] != layers or cells.shape[2] != 2:
            raise ValueError(
                f"cells has the shape {list(cells.shape)}, which must be [{layers}, cells, 2]"
            )
        return cls(experts, cells)


def divergence(profile: RoutingProfile, reference: RoutingProfile) -> float:
    """How far two profiles are apart, nats; 0 where they are alike, of shares and not of sizes.

    The mean over MoE layers of two Jensen-Shannon divergences (Lin 1991): that of the experts'
    shares, and that of "FFN expert or not" given the cell, the mean over cells by their share of
    the selections, both profiles with equal weight. Each is at most log 2.

    Raises:
        ValueError: The shapes differ.
    """
    if profile.shapes != reference.shapes:
        raise ValueError(f"profiles of shapes {profile.shapes} and {reference.shapes} differ")
    of_experts = _jensen_shannon(profile.expert_share(), reference.expert_share()).sum(axis=-1)
    one, other = _by_cell(profile), _by_cell(reference)
    # Shares of (cell, FFN or not), less what the cells' own shares differ: which tokens came is the
    # data's matter, what the router makes of them is the profile's.
    joint = _jensen_shannon(one, other).sum(axis=(1, 2))
    marginal = _jensen_shannon(one.sum(axis=2), other.sum(axis=2)).sum(axis=1)
    return float((of_experts + np.maximum(joint - marginal, 0.0)).mean())


def sampling_noise(profile: RoutingProfile, reference: RoutingProfile) -> float:
    """What `divergence` is on average where both come from one source of independent selections.

    For two large samples of n and m it is d/8 (1/n + 1/m) with d free shares, to second order in
    the shares' differences. Tokens of a text are not independent, so real profiles are a multiple
    of this apart, which depends on the text and not on n and m.
    """
    n, m = profile.experts.sum(axis=1), reference.experts.sum(axis=1)
    used = ((profile.cells + reference.cells)[..., 1] > 0).sum(axis=1)
    free = profile.experts.shape[1] - 1 + used
    return float((free / 8 * (1 / np.maximum(n, 1) + 1 / np.maximum(m, 1))).mean())


def _by_cell(profile: RoutingProfile) -> NDArray[np.float64]:
    """[L, C, 2] shares of the selections: of FFN experts, of others, in each cell."""
    ffn, tokens = profile.cells[..., 0], profile.cells[..., 1]
    totals = tokens.sum(axis=1, keepdims=True)
    topk = _ratio(profile.experts.sum(axis=1, keepdims=True), totals)
    shares = np.stack([_ratio(ffn, totals), topk * _ratio(tokens, totals)], axis=-1)
    shares[..., 1] = np.maximum(shares[..., 1] - shares[..., 0], 0.0)
    return _ratio(shares, topk[..., None])


def _jensen_shannon(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Summands of the Jensen-Shannon divergence, nats."""
    mean = (p + q) / 2
    return (_x_log_x_over(p, mean) + _x_log_x_over(q, mean)) / 2


def _x_log_x_over(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    # 0 log 0 is 0, and where y is 0, x is too.
    return x * np.log(np.divide(x, y, out=np.ones_like(x), where=x > 0))


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
