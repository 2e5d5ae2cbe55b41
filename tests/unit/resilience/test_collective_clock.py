"""Collectives are timed, but for those that a CUDA graph captures."""

import sys

import pytest
import torch
import torch.distributed as dist

from moepp_megatron.training.resilience.stragglers import _CollectiveClock
from moepp_megatron.training.resilience.watchdog import _collective_of


class Event:
    """A CUDA event that has taken a second since the one before it."""

    recorded = 0
    ended = 1_000_000

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.at = Event.recorded

    def query(self):
        return self.at <= Event.ended

    def elapsed_time(self, end):
        return 1000.0 * (end.at - self.at)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(dist, "all_reduce", lambda: "reduced")
    monkeypatch.setattr(Event, "recorded", 0)
    clock = _CollectiveClock()
    clock.start()
    yield clock
    clock.stop()


def test_a_rank_that_waits_for_an_asynchronous_collective_is_in_one(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    waits = clock._timed(lambda: _collective_of(sys._getframe()))
    assert waits() == "Work.wait"
    assert _collective_of(sys._getframe()) is None


def test_nothing_is_recorded_into_a_graph(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dist.all_reduce() == "reduced"
    assert Event.recorded == 0
    assert clock.read() == 0.0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dist.all_reduce() == "reduced"
    assert Event.recorded == 2
    assert clock.read() == 1.0


def test_the_host_waits_for_nothing_that_is_still_running(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        dist.all_reduce()
    monkeypatch.setattr(Event, "ended", 4)
    assert clock.read() == 2.0
    assert clock.read() == 0.0
    monkeypatch.setattr(Event, "ended", 6)
    assert clock.read() == 1.0


def test_collectives_between_steps_do_not_count(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    clock.counting = False
    assert dist.all_reduce() == "reduced"
    clock.counting = True
    dist.all_reduce()
    assert clock.read() == 1.0
