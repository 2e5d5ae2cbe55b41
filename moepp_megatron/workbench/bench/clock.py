"""A clock that runs where the work runs: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


def now() -> Any:
    """A point in time between what was asked for before and what is asked for next.

    On a GPU it is an event in the current stream: the host does not wait, so looking does not slow
    down what is looked at. Work that the host hands out too slowly is waited for by the stream, and
    that wait counts, as in training.
    """
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(begin: Any, end: Any) -> float:
    """Seconds between two points in time; on a GPU only after `settle`."""
    if not torch.cuda.is_available():
        return float(end - begin)
    return float(begin.elapsed_time(end)) * 1e-3


def settle() -> None:
    """Wait until everything that was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
