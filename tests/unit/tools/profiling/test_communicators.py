"""Global ranks from communicators."""

import pytest

from moepp_megatron.tools.profiling.formats.communicators import Membership, global_ranks
from moepp_megatron.tools.profiling.trace import ProfileError


def member(process: str, communicator: str, rank: int, size: int) -> Membership:
    return Membership(process=process, communicator=communicator, rank=rank, size=size)


def test_the_communicator_of_all_gives_the_ranks():
    # The order of process numbers is not that of ranks.
    found = global_ranks(
        [member(name, "world", rank, 3) for rank, name in enumerate(("p9", "p1", "p5"))]
        + [member("p5", "pair", 0, 2), member("p9", "pair", 1, 2)]
    )
    assert found.of_process == {"p9": 0, "p1": 1, "p5": 2}
    assert found.of_communicator == {"world": (0, 1, 2), "pair": (2, 0)}


def test_without_one_processes_are_numbered_by_name(caplog):
    pairs = [("left", ("a", "b")), ("right", ("c", "d"))]
    found = global_ranks(
        member(process, name, rank, 2)
        for name, processes in pairs
        for rank, process in enumerate(processes)
    )
    assert found.of_process == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert found.of_communicator["right"] == (2, 3)
    assert "no communicator holds all 4 processes" in caplog.text


def test_members_without_a_file_leave_the_group_open():
    found = global_ranks([member("a", "world", 0, 4), member("b", "world", 2, 4)])
    assert found.of_process == {"a": 0, "b": 2}
    assert found.of_communicator == {"world": ()}


def test_several_ranks_in_a_process_are_refused():
    with pytest.raises(ProfileError, match="start one process a GPU"):
        global_ranks([member("a", "world", 0, 2), member("a", "world", 1, 2)])
