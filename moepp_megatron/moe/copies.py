"""Copies of rows for the columns of a map, and their sums on the way back.

Two operations, each the other's transpose, so each is the other's backward pass:

    spread   [N, D] -> [C, D]   copy c is row[c]                gradient: add_up
    add_up   [C, D] -> [N, D]   a row is the sum of its copies  gradient: spread

Both only gather. Without atomic additions the sum has one order, that of the columns, on every
device and in every run.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_Move = Callable[[Tensor], Tensor]


class _Rows(ABC):
    """Rows that are spread and added up again."""

    def spread(self, rows: Tensor) -> Tensor:
        """Copy [N, ...] rows to [C, ...]."""
        return _Moved.apply(rows, self._spread, self._add_up)

    def add_up(self, copies: Tensor) -> Tensor:
        """Sum [C, ...] copies to [N, ...] rows; a row without copies is 0."""
        return _Moved.apply(copies, self._add_up, self._spread)

    @abstractmethod
    def _spread(self, rows: Tensor) -> Tensor: ...

    @abstractmethod
    def _add_up(self, copies: Tensor) -> Tensor: ...


class Copies(_Rows):
    """A copy of a row for every true column of its entry in the map `wanted` [N, M].

    `count` are its C true entries, known on the host so that a GPU need not be waited for. `row`
    and `column` are [C] int64, those of each copy, in order of columns, then rows.
    """

    def __init__(self, wanted: Tensor, count: int) -> None:
        self.column, self.row = wanted.T.nonzero_static(size=count).unbind(dim=1)
        # The same copies in order of rows, then columns, and where in it each row begins.
        self._of_rows = self.row.argsort(stable=True)
        lengths = wanted.sum(dim=1)
        self._first = lengths.cumsum(dim=0) - lengths

    def in_order_of_columns(self, values: Tensor) -> Tensor:
        """Reorder [C] values from (row, column) order to that of the copies."""
        return torch.empty_like(values).index_copy(0, self._of_rows, values)

    def _spread(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.row)

    def _add_up(self, copies: Tensor) -> Tensor:
        # A row's copies are the bag of an embedding: read once, added in fp32, written once.
        return F.embedding_bag(self._of_rows, copies, self._first, mode="sum")


class Places(_Rows):
    """[R] rows of a buffer, each with the row of [N, ...] values that it holds.

    `source` [R] int64 is N for a row that holds nothing: its content is arbitrary and goes nowhere.
    Has the operations of `Copies`; the sum is in order of the buffer, rounded to its dtype.
    """

    def __init__(self, source: Tensor, num_values: int) -> None:
        self._source, self._num_values = source, num_values

    def _spread(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._source.clamp(max=self._num_values - 1))

    def _add_up(self, copies: Tensor) -> Tensor:
        sums = copies.new_zeros(self._num_values + 1, *copies.shape[1:])
        return sums.index_add_(0, self._source, copies)[:-1]


class Permutation(_Rows):
    """A new order of rows: row r of the result is row `order[r]`, [R] int64."""

    def __init__(self, order: Tensor) -> None:
        self._order = order
        self._inverse = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )

    def _spread(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._order)

    def _add_up(self, copies: Tensor) -> Tensor:
        return copies.index_select(0, self._inverse)


def rows_of_tokens(routing_map: Tensor, slots: int, numbers: Tensor | None = None) -> Tensor:
    """[T, slots] int32 numbers of each token's copies, for a kernel that adds them up in one pass.

    A token has a copy for each true column of `routing_map` [T, M], at most `slots`. Copies are in
    order of columns, then tokens, or have `numbers` [T, M] int32; -1 in empty slots.
    """
    # Counting along the columns numbers the copies: no sort, and no count for the host to wait for.
    if numbers is None:
        by_column = routing_map.T
        numbers = by_column.flatten().cumsum(dim=0, dtype=torch.int32).view(by_column.shape).T - 1
    slot = routing_map.cumsum(dim=1) - 1
    # What is no copy goes to a slot of its own, which is then cut off.
    slot = slot.masked_fill(~routing_map, slots)
    table = numbers.new_full((routing_map.shape[0], slots + 1), -1)
    return table.scatter_(1, slot, numbers)[:, :slots].contiguous()


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, there: _Move, back: _Move) -> Tensor:
        ctx.back = back
        return there(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad.contiguous()), None, None
