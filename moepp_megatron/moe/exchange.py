"""An all-to-all that runs while other work is computed, forward and backward.

The collective starts at `begin` and is waited for at `end`; what the layer computes between the two
runs while vectors travel. `begin` returns a *ticket*, an empty tensor: it carries the edge of the
autograd graph and nothing that could be read too early.

    forward     begin ---- work ---- end          vectors travel to the experts
    backward    begin <--- work' --- end          their gradients travel back

In the backward pass the roles are swapped: the gradient's all-to-all starts at `end` and is
waited for at `begin`. Autograd runs nodes in the reverse order of their creation, so the
backward pass of the work in between falls between them again.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Exchange:
    """One all-to-all of rows over a group, for one pass.

    Every rank of the group must begin its exchanges in the same order. A group of one rank
    exchanges nothing: ticket and result are the input itself.

    `send` and `receive` are rows for and from each rank, in the order of input and result.
    """

    def __init__(
        self, group: dist.ProcessGroup, send: Sequence[int], receive: Sequence[int]
    ) -> None:
        self._group = group
        self._is_needed = group.size() > 1
        self._send = [int(rows) for rows in send]
        self._receive = [int(rows) for rows in receive]
        self._flight: tuple[dist.Work, Tensor, Tensor] | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """Send `rows` [sum(send), ...], any dtype; returns the ticket."""
        if not self._is_needed:
            return rows
        return _Begin.apply(rows, self)

    def end(self, ticket: Tensor) -> Tensor:
        """Wait; returns the received rows [sum(receive), ...] in the dtype of the sent rows."""
        if not self._is_needed:
            return ticket
        return _End.apply(ticket, self)

    def _start(self, rows: Tensor, send: list[int], receive: list[int]) -> None:
        assert self._flight is None, "an exchange carries one tensor at a time"
        rows = rows.contiguous()
        arriving = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(
            arriving, rows, receive, send, group=self._group, async_op=True
        )
        assert work is not None, "this rank is not in the group that it exchanges with"
        # The input is kept until the collective has read it.
        self._flight = (work, arriving, rows)

    def _finish(self) -> Tensor:
        assert self._flight is not None, "an exchange ends that has not begun"
        work, arrived, _ = self._flight
        self._flight = None
        # NCCL: the current stream waits, the host does not. gloo: the host waits.
        work.wait()
        return arrived


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._start(rows, exchange._send, exchange._receive)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ticket: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._finish(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange._start(grad_rows, exchange._receive, exchange._send)
        return grad_rows.new_empty(0), None
