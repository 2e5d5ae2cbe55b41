"""Has DeepEP's own Python find a stub in place of its compiled extension, within one node.

The stub, `deep_ep_cpp`, makes the checks of deep_ep.cpp and answers with shapes; how many tokens
and rows arrive is balanced routing's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tests.fake_gpu.record import RECORD, ROUTING, owner

# GPUs of a node, for whose numbers its kernels are compiled (kernels/launch.cuh).
MOST_RANKS, _RANKS = 8, (2, 4, 8)


def install() -> None:
    """Before `deep_ep` is imported."""
    module = ModuleType("deep_ep_cpp")
    vars(module).update(Config=Config, EventHandle=EventHandle, Buffer=Buffer)
    sys.modules["deep_ep_cpp"] = module


class Config:
    """How much is sent at a time."""

    def __init__(
        self,
        num_sms: int = 20,
        nvl_send: int = 6,
        nvl_recv: int = 256,
        rdma_send: int = 6,
        rdma_recv: int = 256,
    ) -> None:
        assert num_sms % 2 == 0
        assert nvl_send < nvl_recv
        assert rdma_send < rdma_recv
        self.channels = num_sms // 2

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 1 << 28

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0 if num_ranks <= MOST_RANKS else 1 << 28


class EventHandle:
    """An event of a stream."""

    def current_stream_wait(self) -> None:
        pass


def _waits(previous: Any, is_async: bool, on_comm_stream: bool) -> EventHandle | None:
    assert previous is None or isinstance(previous, EventHandle)
    assert not on_comm_stream or (previous is not None and is_async)
    return EventHandle() if is_async else None


def _matrix(tensor: Any, dtype: torch.dtype, *sizes: int | None) -> None:
    """Checks the dtype, the sizes that are given, and that it is contiguous on the device."""
    assert tensor.is_cuda, f"on {tensor.device}"
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous()
    assert tensor.dim() == len(sizes), f"{tuple(tensor.shape)} for {sizes}"
    for size, wanted in zip(tensor.shape, sizes, strict=True):
        assert wanted is None or size == wanted, f"{tuple(tensor.shape)} for {sizes}"


def _new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        RECORD.operations[f"deep_ep.{function.__name__}"] += 1
        RECORD.owners[owner()] += 1
        return function(*args, **kwargs)

    return counted


class Buffer:
    """The runtime of one rank. Its handles know nothing of memory, so none is counted for it."""

    def __init__(
        self, rank: int, num_ranks: int, nvl_bytes: int, rdma_bytes: int, low_latency: bool
    ) -> None:
        assert 0 <= rank < num_ranks
        assert num_ranks in _RANKS, f"within a node there are 2, 4 or 8 ranks, not {num_ranks}"
        self.ranks, self.is_there = num_ranks, False

    def get_num_rdma_ranks(self) -> int:
        return 1

    def get_local_device_id(self) -> int:
        return 0

    def get_local_ipc_handle(self) -> bytes:
        return b""

    def sync(self, device_ids: list[Any], handles: list[Any], unique_id: Any) -> None:
        assert len(device_ids) == len(handles) == self.ranks
        assert not self.is_there
        self.is_there = True

    def is_available(self) -> bool:
        return self.is_there

    @_kernel
    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, previous: Any, is_async: bool, on_comm: bool
    ) -> tuple[Any, ...]:
        _matrix(topk_idx, torch.int64, None, None)
        assert num_experts > 0
        event = _waits(previous, is_async, on_comm)
        counts = [_new(torch.int32, size) for size in (self.ranks, num_experts)]
        return counts[0], None, counts[1], _new(torch.bool, len(topk_idx), self.ranks), event

    @_kernel
    def intranode_dispatch(
        self,
        x: torch.Tensor,
        scales: Any,
        topk_idx: Any,
        topk_weights: Any,
        per_rank: Any,
        in_rank: torch.Tensor,
        per_expert: Any,
        cached_tokens: int,
        cached_ranks: Any,
        cached_channels: Any,
        alignment: int,
        config: Config,
        previous: Any,
        is_async: bool,
        on_comm: bool,
    ) -> tuple[Any, ...]:
        tokens, hidden = x.shape
        assert scales is None, "megatron-core sends no FP8"
        _matrix(x, torch.bfloat16, None, None)
        assert hidden * x.element_size() % 16 == 0
        _matrix(in_rank, torch.bool, tokens, self.ranks)
        event = _waits(previous, is_async, on_comm)
        arrived, counts, received = cached_tokens, [], (None, None)
        if cached_ranks is None:
            _matrix(per_rank, torch.int32, self.ranks)
            _matrix(per_expert, torch.int32, None)
            assert len(per_expert) % self.ranks == 0
            arrived = ROUTING.copies * self.ranks
            RECORD.read("DeepEP")
            counts = [ROUTING.rows * ROUTING.sources] * (len(per_expert) // self.ranks)
        else:
            _matrix(cached_ranks, torch.int32, self.ranks, self.ranks)
            _matrix(cached_channels, torch.int32, self.ranks, config.channels)
        assert (topk_idx is None) == (topk_weights is None)
        if topk_idx is not None:
            slots = topk_idx.shape[1]
            _matrix(topk_idx, torch.int64, tokens, None)
            _matrix(topk_weights, torch.float32, tokens, slots)
            received = _new(torch.int64, arrived, slots), _new(torch.float32, arrived, slots)
        channels = [_new(torch.int32, self.ranks, config.channels) for _ in range(2)]
        ranks = _new(torch.int32, self.ranks, self.ranks) if cached_ranks is None else cached_ranks
        return (
            _new(x.dtype, arrived, hidden),
            None,
            *received,
            counts,
            ranks,
            *channels,
            _new(torch.int32, arrived),
            _new(torch.int32, tokens, self.ranks),
            event,
        )

    @_kernel
    def intranode_combine(
        self,
        x: torch.Tensor,
        topk_weights: Any,
        src_idx: torch.Tensor,
        ranks: torch.Tensor,
        channels: torch.Tensor,
        send_head: torch.Tensor,
        config: Config,
        previous: Any,
        is_async: bool,
        on_comm: bool,
    ) -> tuple[Any, ...]:
        arrived, hidden = x.shape
        _matrix(x, torch.bfloat16, None, None)
        assert hidden * x.element_size() % 16 == 0
        _matrix(src_idx, torch.int32, arrived)
        _matrix(send_head, torch.int32, None, self.ranks)
        _matrix(ranks, torch.int32, self.ranks, self.ranks)
        _matrix(channels, torch.int32, self.ranks, config.channels)
        event = _waits(previous, is_async, on_comm)
        tokens, weights = len(send_head), None
        if topk_weights is not None:
            _matrix(topk_weights, torch.float32, arrived, None)
            weights = _new(torch.float32, tokens, topk_weights.shape[1])
        return _new(x.dtype, tokens, hidden), weights, event
