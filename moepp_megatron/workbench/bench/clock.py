"""A clock that runs where the work runs: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time
from typing import Any

import torch


def now() -> Any:
    """A point in time between the work requested before and after.

    On a GPU it is an event in the current stream: the host does not wait, so measuring does not
    slow down the work. If the host launches work too slowly, the stream waits for it, and that wait
    counts, as in training.
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
    """Wait until all requested work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
