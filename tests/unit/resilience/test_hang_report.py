"""The ranks that are named, from the heartbeats they leave."""

import os
import socket
import subprocess

from moepp_megatron.training.resilience.hang_report import Heartbeat, HeartbeatFolder, hang_report


def beat(rank, count=7, collective="all_reduce"):
    return Heartbeat(
        rank=rank,
        host="elsewhere",
        pid=100 + rank,
        beat=3,
        step=5,
        phase="step",
        count=count,
        stalled_s=9.0,
        collective=collective,
        place=f"program.py:{rank}",
        has_dumped=True,
    )


def report(beats, silent=(), pending=None):
    found = {b.rank: b for b in beats}
    return hang_report(found, silent, 4, pending or {}).splitlines()


def test_silent_rank():
    lines = report([beat(rank) for rank in range(4)], silent=(2,))
    assert lines[0].startswith("hang: rank 2 does not answer; last seen in step 5 (step), process")
    assert lines[1] == "  3 other ranks wait in all_reduce"
    assert not any(line.startswith("  rank 2") for line in lines)


def test_rank_that_never_wrote():
    lines = report([beat(0), beat(1), beat(2)], silent=(3,))
    assert lines[0] == "hang: rank 3 does not answer and has never written a heartbeat"


def test_rank_that_is_behind():
    lines = report([beat(0), beat(1, count=6), beat(2), beat(3)])
    assert lines[0].startswith("hang: rank 1 is behind")


def test_rank_outside_of_collectives():
    lines = report([beat(0), beat(1), beat(2), beat(3, collective=None)])
    assert lines[0].startswith("hang: rank 3 is in no collective")
    assert "in program.py:3" in lines[0]


def test_nobody_to_blame():
    pending = {0: "nccl:all_reduce number 9", 1: "nccl:all_gather number 9"}
    lines = report([beat(rank) for rank in range(4)], pending=pending)
    assert lines[0].startswith("hang: all ranks answer and wait for each other")
    assert "  1 other rank waits in nccl:all_gather number 9" in lines


def test_state_of_a_process_of_this_machine():
    gone = subprocess.Popen(["true"])
    gone.wait()
    lines = {}
    for pid in (os.getpid(), gone.pid):
        here = Heartbeat(**{**vars(beat(1)), "host": socket.gethostname(), "pid": pid})
        lines[pid] = report([beat(0), here], silent=(1,))[0]
    assert "which is R (running)" in lines[os.getpid()]
    assert lines[gone.pid].endswith("which is gone")


def test_first_alarm_counts(tmp_path):
    folder = HeartbeatFolder(tmp_path / "heartbeats")
    folder.clear()
    assert folder.alarm() is None
    assert folder.raise_alarm("first") == "first"
    assert folder.raise_alarm("second") == "first"
    folder.clear()
    assert folder.alarm() is None


def test_a_disk_that_takes_no_heartbeat_stops_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    HeartbeatFolder(tmp_path / "file/heartbeats").clear()


def test_unreadable_heartbeats_are_left_out(tmp_path):
    folder = HeartbeatFolder(tmp_path)
    folder.write(beat(0))
    folder.write(beat(2))
    (tmp_path / "rank_00002.json").write_text('{"rank": 2')
    assert folder.read(4) == {0: beat(0)}


def test_a_vanished_folder_is_made_again(tmp_path):
    folder = HeartbeatFolder(tmp_path / "missing")
    folder.write(beat(0))
    assert folder.raise_alarm("mine") == "mine"
    assert folder.read(4) == {0: beat(0)}
