"""Derives global ranks from NCCL's profilers, which report ranks within communicators.

NCCL has no ranks of a job. A process is identified by its host and number, and belongs to several
communicators, in each with a rank of its own. In torch the default group holds every process, with
the job's ranks; where a run has never used it, the processes are numbered in the order of their
names.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.formats.records import SourceError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A process in a communicator.

    Attributes:
        process: Names the process, across hosts.
        communicator: Names the communicator.
        rank: Rank within it.
        size: Number of its ranks; 0 where unknown.
    """

    process: str
    communicator: str
    rank: int
    size: int


@dataclass(frozen=True)
class Ranks:
    """Global ranks.

    Attributes:
        of_process: Global rank by process.
        of_communicator: Global ranks by communicator, in its order; empty where not every member
            was recorded.
        sizes: Number of ranks by communicator; 0 where unknown.
    """

    of_process: dict[str, int]
    of_communicator: dict[str, tuple[int, ...]]
    sizes: dict[str, int]


def global_ranks(memberships: Iterable[Membership]) -> Ranks:
    """Numbers the processes of a job.

    Raises:
        SourceError: If a process has several ranks in a communicator, or two have the same.
    """
    members: dict[str, dict[int, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for one in sorted(set(memberships), key=lambda one: (one.communicator, one.rank, one.process)):
        taken = members[one.communicator].setdefault(one.rank, one.process)
        if taken != one.process:
            raise SourceError(
                f"communicator {one.communicator}: processes {taken} and {one.process} both have "
                f"rank {one.rank}; give files of one run only"
            )
        sizes[one.communicator] = max(sizes[one.communicator], one.size)
    for communicator, by_rank in members.items():
        if len(set(by_rank.values())) < len(by_rank):
            raise SourceError(
                f"communicator {communicator}: one process has several of its ranks; runs with "
                "several GPUs a process are not supported, start one process a GPU"
            )
    numbers = _number(members, sizes)
    whole = {name: _whole(members[name], sizes[name], numbers) for name in members}
    return Ranks(numbers, whole, dict(sizes))


def _number(members: dict[str, dict[int, str]], sizes: dict[str, int]) -> dict[str, int]:
    processes = sorted({process for by_rank in members.values() for process in by_rank.values()})
    if not processes:
        return {}
    largest = max(members, key=lambda name: (len(members[name]), sizes[name], name))
    if len(members[largest]) == len(processes):
        return {process: rank for rank, process in members[largest].items()}
    logger.warning(
        "no communicator holds all %d processes; they are numbered in the order of their names "
        "(%s is rank 0)",
        len(processes),
        processes[0],
    )
    return {process: number for number, process in enumerate(processes)}


def _whole(by_rank: dict[int, str], size: int, numbers: dict[str, int]) -> tuple[int, ...]:
    if sorted(by_rank) != list(range(size)):
        return ()
    return tuple(numbers[by_rank[rank]] for rank in range(size))
