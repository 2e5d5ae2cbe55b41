"""Random states of a rank, taken and given back."""

import random

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

from moepp_megatron.training import rng
from moepp_megatron.training.step import _StepState


def _with_generators(tracker):
    """Streams as with CUDA graphs: a graph knows a stream's generator and advances it."""
    stream = torch.Generator().manual_seed(1)
    tracker.states_["stream"] = stream
    return lambda: torch.rand((), generator=stream).item()


def _with_tensors(tracker):
    """Streams otherwise: the tracker replaces a stream's state after each use."""
    tracker.states_["stream"] = torch.Generator().manual_seed(1).get_state()

    def draw():
        stream = torch.Generator()
        stream.set_state(tracker.states_["stream"])
        value = torch.rand((), generator=stream).item()
        tracker.states_["stream"] = stream.get_state()
        return value

    return draw


@pytest.fixture(params=[_with_generators, _with_tensors])
def draw(monkeypatch, request):
    """A number of each stream."""
    tracker = CudaRNGStatesTracker()
    draw_from_tracker = request.param(tracker)
    monkeypatch.setattr(rng, "get_cuda_rng_tracker", lambda: tracker)
    # A generator beside the default one stands for that of a GPU.
    gpu = torch.Generator().manual_seed(2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", gpu.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", gpu.set_state)
    streams = (
        random.random,
        np.random.rand,
        lambda: torch.rand(()).item(),
        lambda: torch.rand((), generator=gpu).item(),
        draw_from_tracker,
    )
    return lambda: [stream() for stream in streams]


def test_every_stream_continues_from_the_state_taken(draw):
    state = rng.get_rng_state()
    first, second = draw(), draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    rng.set_rng_state(state)
    assert [draw(), draw()] == [first, second]


def test_a_refused_step_draws_its_numbers_again(draw):
    buffer = torch.zeros(2)
    model = torch.nn.Module()
    model.register_buffer("bias", buffer)
    before = _StepState([model])
    first = draw()
    buffer.add_(1.0)
    before.restore()
    assert draw() == first
    assert buffer.tolist() == [0.0, 0.0]
    draw()
    before.restore()
    assert draw() == first
