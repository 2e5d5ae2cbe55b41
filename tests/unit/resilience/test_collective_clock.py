"""Collectives are timed, but for those that a CUDA graph captures."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moepp_megatron.training.resilience.collective_clock import CollectiveClock


class Event:
    """A CUDA event that has taken a second since the one before it."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.at - self.at)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(dist, "all_reduce", lambda: "reduced")
    monkeypatch.setattr(Event, "recorded", 0)
    clock = CollectiveClock()
    clock.start()
    yield clock
    clock.stop()


def test_nothing_is_recorded_into_a_graph(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert dist.all_reduce() == "reduced"
    assert Event.recorded == 0
    assert clock.read() == 0.0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert dist.all_reduce() == "reduced"
    assert Event.recorded == 2
    assert clock.read() == 1.0
