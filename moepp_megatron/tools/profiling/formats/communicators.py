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
from typing import NamedTuple

from moepp_megatron.tools.profiling.trace import ProfileError

logger = logging.getLogger(__name__)


class Membership(NamedTuple):
    """A process in a communicator: the names of both, its rank there, and the ranks of all."""

    communicator: str
    rank: int
    process: str
    size: int


class Ranks(NamedTuple):
    """Global ranks by process, and by communicator (in its order; empty if one is missing)."""

    of_process: dict[str, int]
    of_communicator: dict[str, tuple[int, ...]]


def global_ranks(memberships: Iterable[Membership]) -> Ranks:
    """Numbers the processes of a job.

    Raises:
        ProfileError: A process has several ranks in a communicator, or two have the same.
    """
    members: dict[str, dict[int, str]] = defaultdict(dict)
    sizes: dict[str, int] = defaultdict(int)
    for item in sorted(set(memberships)):
        taken = members[item.communicator].setdefault(item.rank, item.process)
        if taken != item.process:
            raise ProfileError(
                f"communicator {item.communicator}: processes {taken} and {item.process} both have "
                f"rank {item.rank}; give files of one run only"
            )
        sizes[item.communicator] = max(sizes[item.communicator], item.size)
    for communicator, by_rank in members.items():
        if len(set(by_rank.values())) < len(by_rank):
            raise ProfileError(
                f"communicator {communicator}: one process has several of its ranks; runs with "
                "several GPUs a process are not supported, start one process a GPU"
            )
    numbers = _number(members)
    whole = {
        name: tuple(numbers[by_rank[rank]] for rank in sorted(by_rank))
        if sorted(by_rank) == list(range(sizes[name]))
        else ()
        for name, by_rank in members.items()
    }
    return Ranks(numbers, whole)


def _number(members: dict[str, dict[int, str]]) -> dict[str, int]:
    processes = sorted({process for by_rank in members.values() for process in by_rank.values()})
    largest = max(members.values(), key=len, default={})
    if len(largest) == len(processes):
        return {process: rank for rank, process in largest.items()}
    logger.warning(
        "no communicator holds all %d processes; they are numbered in the order of their names "
        "(%s is rank 0)",
        len(processes),
        processes[0],
    )
    return {process: number for number, process in enumerate(processes)}
