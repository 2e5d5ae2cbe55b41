"""The time a machine waits for the others: at the start, after a failure, while ranks run."""

import dataclasses
import socket
import sys

from moepp_megatron.config.exit_codes import LOST
from moepp_megatron.runtime.launch import LaunchOptions, run_ranks
from moepp_megatron.runtime.nodes import Meeting, Nodes

NODES = Nodes(2, 0, "127.0.0.1", join_timeout_s=900, restart_timeout_s=120)


def test_first_meeting_may_take_the_longer_time():
    meeting = Meeting(NODES, now=0.0)
    assert meeting.failure(False, 899.0) is None
    assert meeting.failure(False, 901.0) == "the 2 machines did not meet at 127.0.0.1 within 900 s"


def test_meeting_after_a_failure_is_given_up_sooner():
    meeting = Meeting(NODES, now=0.0)
    # Ranks may run for as long as they like.
    for now in (10.0, 100_000.0):
        assert meeting.failure(True, now) is None
    for now in (100_000.0, 100_119.0):
        assert meeting.failure(False, now) is None
    failure = meeting.failure(False, 100_121.0)
    assert "did not come back within 120 s after a failure (--restart-timeout)" in failure


def test_each_restart_has_the_whole_time():
    meeting = Meeting(NODES, now=0.0)
    for start in (0.0, 1000.0):
        assert meeting.failure(True, start) is None
        for now in (start + 10.0, start + 129.0):
            assert meeting.failure(False, now) is None


def test_machine_that_nobody_joins_says_so_and_ends(capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = dataclasses.replace(NODES, port=port, run_id="alone", join_timeout_s=2)
    assert run_ranks(LaunchOptions(1, nodes), "this", []) == LOST
    printed = capfd.readouterr().err
    assert "error: the 2 machines did not meet at 127.0.0.1 within 2 s; exit status 71" in printed
    assert "Traceback" not in printed
    assert sys.executable not in printed


def test_port_of_another_program_is_named(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        nodes = dataclasses.replace(NODES, port=other.getsockname()[1], run_id="taken")
        assert run_ranks(LaunchOptions(1, nodes), "this", []) == 1
    printed = capfd.readouterr().err
    assert f"port: {nodes.port}" in printed
    assert "address already in use" in printed
    assert "Traceback" not in printed
