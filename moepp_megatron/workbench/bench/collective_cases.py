"""One collective at one size in one group: its buffers, the call, and the expected result.

Every element encodes the rank and the position that it comes from, so an element that arrives at
the wrong place, or twice, is a wrong element. All values are integers that bf16 holds exactly, and
so are all sums, in whatever order they are formed.

Sizes follow nccl-tests (doc/PERFORMANCE.md): bytes of the larger of a rank's two buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moepp_megatron.workbench.profiling.collective import Operation

# bf16 has 8 significant bits: integers up to 256 are exact.
_EXACT = 256
# No data holds it.
_POISON = -1


@dataclass(frozen=True)
class Kind:
    """An operation in the form that is measured.

    Attributes:
        operation: What it does; SEND stands for sending to the next rank of the group while
            receiving from the one before.
        even: Whether all ranks send the same to all; only all-to-all has an uneven form.
        label: Its name in tables.
    """

    operation: Operation
    even: bool
    label: str


KINDS = {
    "all_to_all": Kind(Operation.ALL_TO_ALL, True, "all-to-all"),
    "all_to_all_uneven": Kind(Operation.ALL_TO_ALL, False, "all-to-all uneven"),
    "all_reduce": Kind(Operation.ALL_REDUCE, True, "all-reduce"),
    "all_gather": Kind(Operation.ALL_GATHER, True, "all-gather"),
    "reduce_scatter": Kind(Operation.REDUCE_SCATTER, True, "reduce-scatter"),
    "send_receive": Kind(Operation.SEND, True, "send/receive"),
}


@dataclass(frozen=True)
class RankGroup:
    """A process group that this rank is in.

    Attributes:
        process_group: The group.
        ranks: Its global ranks, ascending.
        nodes: Machines that the widest group of this size spans.
    """

    process_group: dist.ProcessGroup
    ranks: tuple[int, ...]
    nodes: int = 1

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return len(self.ranks)

    @property
    def place(self) -> int:
        """This rank's number within the group."""
        return self.ranks.index(dist.get_rank())


class Buffers:
    """Three buffers that all cases of a rank share; a case takes the first part of each.

    Args:
        count: Elements of the largest case.
        dtype: Type of the elements.
        device: This rank's device.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        rank = dist.get_rank()
        self.moved = _moved(rank, 0, count, device).to(dtype)
        self.summed = _summed(rank, 0, count, device).to(dtype)
        self.output = torch.empty(count, dtype=dtype, device=device)


def _moved(rank: int, start: int, count: int, device: torch.device) -> Tensor:
    """[count] int64 elements that `rank` sends, from element `start` on."""
    return (torch.arange(start, start + count, device=device) * 7 + 31 * rank) % 251


def _summed(rank: int, start: int, count: int, device: torch.device) -> Tensor:
    """[count] int64 elements that `rank` adds: so small that the sum over all ranks is exact."""
    world = dist.get_world_size()
    values = min(8, _EXACT // world + 1)
    # In a larger world most ranks add zeros.
    every = -(-world // _EXACT)
    if rank % every:
        return torch.zeros(count, dtype=torch.int64, device=device)
    return (torch.arange(start, start + count, device=device) + rank) % max(2, values)


class Case:
    """One kind at one size in one group.

    Uneven all-to-all: every rank sends rank p of n the share (p + 1) / n of what it sends the last
    one. The last rank is the busiest, and the size is what it receives.

    Args:
        kind: The operation.
        group: The group.
        size: Wanted bytes; the next smaller size that divides into equal parts is taken.
        buffers: Buffers of this rank.
    """

    def __init__(self, kind: Kind, group: RankGroup, size: int, buffers: Buffers) -> None:
        self.kind, self.group = kind, group
        self._buffers = buffers
        width, n = buffers.output.element_size(), group.size
        parts = {True: 1 if self._is_whole else n, False: n * n}[kind.even]
        self.count = max(1, size // width // parts) * parts
        self.size = self.count * width
        self._part = self.count // n
        self._run = self._prepare_call()

    @property
    def _is_whole(self) -> bool:
        """Whether the buffer needs no division among the ranks."""
        return self.kind.operation in (Operation.ALL_REDUCE, Operation.SEND)

    def sent_elements(self) -> int:
        """Elements at the start of this rank's data that take part."""
        if self.kind.operation is Operation.ALL_TO_ALL:
            return sum(self._shares())
        return self._part if self.kind.operation is Operation.ALL_GATHER else self.count

    def prepare(self) -> None:
        """Restore what a run overwrites: torch has an all-reduce in place only."""
        if self.kind.operation is Operation.ALL_REDUCE:
            self._buffers.output[: self.count].copy_(self._buffers.summed[: self.count])

    def run(self) -> None:
        """Run the operation once; every rank of the group must call."""
        self._run()

    def wrong(self) -> int:
        """Run once more and count this rank's wrong elements."""
        self._buffers.output.fill_(_POISON)
        self.prepare()
        self.run()
        expected = self._expected()
        arrived = self._buffers.output[: len(expected)]
        return int((arrived != expected.to(arrived.dtype)).sum())

    def _shares(self) -> list[int]:
        """Elements that each rank of the group receives from every one, all-to-all."""
        n = self.group.size
        if self.kind.even:
            return [self._part] * n
        return [self.count // (n * n) * (place + 1) for place in range(n)]

    def _prepare_call(self) -> Callable[[], object]:
        operation, group = self.kind.operation, self.group.process_group
        moved, summed, output = self._buffers.moved, self._buffers.summed, self._buffers.output
        count, part = self.count, self._part
        if operation is Operation.ALL_TO_ALL:
            shares = self._shares()
            own = shares[self.group.place]
            received, sent = output[: own * self.group.size], moved[: self.sent_elements()]
            receive = [own] * self.group.size
            return lambda: dist.all_to_all_single(received, sent, receive, shares, group=group)
        if operation is Operation.ALL_REDUCE:
            return lambda: dist.all_reduce(output[:count], group=group)
        if operation is Operation.ALL_GATHER:
            return lambda: dist.all_gather_into_tensor(output[:count], moved[:part], group=group)
        if operation is Operation.REDUCE_SCATTER:
            return lambda: dist.reduce_scatter_tensor(output[:part], summed[:count], group=group)
        return self._send_to_next

    def _send_to_next(self) -> None:
        ranks, place = self.group.ranks, self.group.place
        group, count = self.group.process_group, self.count
        following, before = ranks[(place + 1) % len(ranks)], ranks[place - 1]
        transfers = [
            dist.P2POp(dist.isend, self._buffers.moved[:count], following, group=group),
            dist.P2POp(dist.irecv, self._buffers.output[:count], before, group=group),
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    def _expected(self) -> Tensor:
        """The expected elements as int64, in order."""
        ranks, place, device = self.group.ranks, self.group.place, self._buffers.output.device
        operation = self.kind.operation
        if operation is Operation.ALL_TO_ALL:
            shares = self._shares()
            start, own = sum(shares[:place]), shares[place]
            return torch.cat([_moved(rank, start, own, device) for rank in ranks])
        if operation is Operation.ALL_GATHER:
            return torch.cat([_moved(rank, 0, self._part, device) for rank in ranks])
        if operation is Operation.SEND:
            return _moved(ranks[place - 1], 0, self.count, device)
        whole = operation is Operation.ALL_REDUCE
        start, count = (0, self.count) if whole else (place * self._part, self._part)
        total = torch.zeros(count, dtype=torch.int64, device=device)
        for rank in ranks:
            total += _summed(rank, start, count, device)
        return total
