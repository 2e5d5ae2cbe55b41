"""Micro-batches for the device."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from megatron.core import parallel_state

from moepp_megatron.training import batches


@pytest.mark.parametrize(
    ("num_workers", "graphs", "pins"),
    [(0, ["attn"], True), (2, [], True), (2, ["attn"], False)],
)
def test_no_thread_pins_while_graphs_are_captured(monkeypatch, num_workers, graphs, pins):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 1)
    monkeypatch.setattr(batches, "sample_index", lambda *_: 0)
    monkeypatch.setattr(batches, "vocabulary_of", lambda *_: 8)
    loader = Mock(return_value=[{}])
    monkeypatch.setattr(batches, "batches", loader)
    config = SimpleNamespace(
        training=SimpleNamespace(batch_sizes=[4], micro_batch_size=2, cuda_graphs=graphs),
        data=SimpleNamespace(num_workers=num_workers),
        model=SimpleNamespace(vocab_size=8),
    )
    next(batches._endless(SimpleNamespace(), 0, config))
    assert loader.call_args.kwargs["pin_memory"] is pins
