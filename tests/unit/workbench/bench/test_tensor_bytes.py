"""Bytes of tensors, counted as they come and go."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from benchmarks.tensor_bytes import live_bytes, tensor_bytes

MEGABYTE = 2**20


def test_peak_is_the_most_at_one_time() -> None:
    held: list[torch.Tensor] = []

    def prepare() -> Callable[[], None]:
        held.append(torch.zeros(3 * MEGABYTE, dtype=torch.uint8))
        return work

    def work() -> None:
        first = torch.zeros(4 * MEGABYTE, dtype=torch.uint8)
        del first
        second = torch.zeros(2 * MEGABYTE, dtype=torch.uint8)
        held.append(second[:1])

    # Cycles that tests before this one have left must not go in between.
    gc.collect()
    already = live_bytes()
    found = tensor_bytes(prepare)
    assert found.before - already == 3 * MEGABYTE
    assert found.peak - found.before == 4 * MEGABYTE
    # The slice keeps its whole storage, which is a tensor that Python knows.
    assert live_bytes() - found.before == 2 * MEGABYTE
    assert found.unseen == 0


def test_a_storage_counts_once() -> None:
    gc.collect()
    already = live_bytes()
    whole = torch.zeros(MEGABYTE, dtype=torch.uint8)
    views = [whole[:10], whole.view(2, -1), whole.detach()]
    assert live_bytes() - already == MEGABYTE
    assert len(views) == 3
