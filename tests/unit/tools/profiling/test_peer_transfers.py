"""Which sends and receives make one all-to-all."""

from moepp_megatron.tools.profiling.collective import Collective, Operation
from moepp_megatron.tools.profiling.formats.peer_transfers import (
    PeerTransfer,
    join_transfers,
    split_calls,
)

BASE = Collective(operation=Operation.OTHER, rank=5, group="ep", group_size=4, sequence=7)


def transfer(is_send: bool, peer: int, size: int = 8, issued: float | None = None) -> PeerTransfer:
    returned = None if issued is None else issued + 2.5
    return PeerTransfer(
        is_send=is_send,
        peer=peer,
        size=size,
        start_us=10.0,
        end_us=20.0,
        issued_us=issued,
        returned_us=returned,
    )


def sizes(calls: list[list[PeerTransfer]]) -> list[int]:
    return [len(call) for call in calls]


def test_a_repeated_peer_begins_the_next_call():
    order = [transfer(True, 2), transfer(False, 2), transfer(True, 3), transfer(True, 2)]
    assert sizes(split_calls(order, own_rank=1)) == [3, 1]


def test_a_send_to_oneself_begins_the_next_call():
    order = [transfer(True, 2), transfer(False, 2), transfer(True, 1), transfer(False, 1)]
    assert sizes(split_calls(order, own_rank=1)) == [2, 2]


def test_times_part_calls_that_share_no_peer():
    # Without the host's times these would be one call: no peer comes twice.
    issued = [transfer(True, 0, issued=100), transfer(False, 2, issued=101)]
    later = [transfer(True, 3, issued=200), transfer(False, 3, issued=201)]
    assert sizes(split_calls(issued + later, own_rank=1)) == [2, 2]
    untimed = [transfer(one.is_send, one.peer) for one in issued + later]
    assert sizes(split_calls(untimed, own_rank=1)) == [4]


def test_a_pipeline_exchange_stays_sends_and_receives():
    call = [transfer(True, 2, 100), transfer(False, 0, 50), transfer(False, 2, 25)]
    made = join_transfers(call, 1, BASE)
    assert [one.operation for one in made] == [Operation.SEND, Operation.RECEIVE, Operation.RECEIVE]
    assert [one.pair for one in made] == [(1, 2), (0, 1), (2, 1)]
    assert all(one.sequence is None and one.rank == 5 for one in made)


def test_more_than_two_peers_are_an_all_to_all():
    call = [transfer(True, peer, 10 * peer) for peer in (0, 2, 3)]
    (made,) = join_transfers(call, 1, BASE)
    assert made.operation is Operation.ALL_TO_ALL
    assert made.sent == (0, 0, 20, 30)
    assert made.received == (0, 0, 0, 0)
    assert (made.size, made.sequence) == (50, 7)


def test_parts_are_unknown_where_the_group_is():
    unknown = Collective(operation=Operation.OTHER, rank=1)
    (made,) = join_transfers([transfer(True, 1), transfer(False, 1)], 1, unknown)
    assert made.sent is None
    assert made.size == 8
