"""Answers to what megatron-core and dispatchers read, by balanced routing (`record.ROUTING`)."""

import contextlib
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from tests.fake_gpu.record import RECORD, ROUTING

# GPUs that NVLink joins.
_NODE = 8


def answer_checks():
    """Nothing is compiled here, and DeepEP's functions are answered."""
    from moepp_megatron.runtime import fit, optional

    fit.compiler_obstacle = fit._extension_obstacle = lambda: None
    fit.flex_backends = optional.flex_backends = lambda: ("deepep", "hybridep")


def answer_megatron():
    """Answer what megatron-core and the dispatchers read; after they have been imported."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    import moepp_megatron.moe.dedup_dispatcher as dedup

    _answer_offloading()

    def move(tensor, as_numpy=False, record_stream=False):
        if not (isinstance(tensor, torch.Tensor) and tensor.is_cuda):
            return tensor
        rows = ROUTING.rows
        if tensor.dim() == 0:
            value = ROUTING.counted
        elif as_numpy:
            value = rows * ROUTING.local_experts
            caller = sys._getframe(1).f_locals.get("self")
            if tensor is getattr(caller, "output_splits_tp", None):
                # What each tensor rank got of all expert-parallel ranks.
                value *= ROUTING.ranks
        else:
            value = rows if tensor.dim() == 2 else rows * ROUTING.sources
        counts = np.full(tuple(tensor.shape), value, dtype=np.int64)
        if as_numpy:
            return counts
        with unset_fake_temporarily():
            return torch.from_numpy(counts)

    token_dispatcher.maybe_move_tensor_to_cpu = move

    dispatcher = dedup.DedupAlltoAllTokenDispatcher
    exchange_counts = dispatcher.exchange_counts
    dispatcher.counts_of_this_rank = lambda self, rows: None

    def counted(self, *maps):
        def exchanged(rows):
            each = [rows] * self.ep_size
            return dedup._ExchangedRows(each, each, [rows * self.ep_size] * self.tp_size)

        return replace(
            exchange_counts(self, *maps),
            copies=exchanged(ROUTING.copies),
            selections=exchanged(ROUTING.rows * self.num_local_experts),
        )

    dispatcher.exchange_counts = counted
    _answer_flex(token_dispatcher)


def _answer_offloading():
    """A played tensor is one of the device's, and its copy on the host is pinned."""
    from megatron.core.pipeline_parallel import fine_grained_activation_offload as offload

    handler = offload.ChunkOffloadHandler
    handler._can_manage_tensor_for_offload = staticmethod(
        lambda tensor: tensor.is_cuda and not isinstance(tensor, torch.nn.Parameter)
    )
    copy = handler.reload

    def reload(self, state, non_blocking=None):
        return copy(self, state, True)

    if copy.__module__ == offload.__name__:
        handler.reload = reload


def _answer_flex(token_dispatcher):
    """DeepEP's and HybridEP's functions, by their shapes; each waits for its counts on the host.

    DeepEP's check what its C++ checks of what it is given (deep_ep.cpp).
    """

    def arrived(x, rows):
        return x.index_select(0, torch.zeros(rows, dtype=torch.long, device=x.device))

    def rows_of_expert(multiple):
        return -(-ROUTING.rows * ROUTING.sources // multiple) * multiple

    def counts(multiple=1):
        with unset_fake_temporarily():
            return torch.full((ROUTING.local_experts,), rows_of_expert(multiple), dtype=torch.long)

    def sent(x, group):
        assert group.size() in (2, 4, 8) or group.size() % _NODE == 0, group.size()
        assert x.dtype is torch.bfloat16, f"rows in {x.dtype}"
        assert x.dim() == 2
        assert x.shape[1] * x.element_size() % 16 == 0, f"rows of {x.shape[1]}"
        assert x.is_cuda
        assert x.is_contiguous()

    def dispatch(x, indices, probs, num_experts, group, **options):
        sent(x, group)
        assert num_experts % group.size() == 0
        for tensor, dtype in ((indices, torch.int64), (probs, torch.float32)):
            assert tensor.dtype is dtype, f"{tensor.dtype}, not {dtype}"
            assert tensor.shape == (x.shape[0], indices.shape[1])
            assert tensor.is_contiguous()
        RECORD.read("DeepEP")
        rows = ROUTING.copies * group.size()
        return arrived(x, rows), arrived(indices, rows), arrived(probs, rows), counts(), x.shape

    def combine(x, group, handle, **options):
        sent(x, group)
        return arrived(x, handle[0]), None

    def permuting_dispatch(x, routing_map, probs, pad_multiple=None, **_):
        assert routing_map.dtype is torch.bool
        assert probs.dtype is torch.float32
        RECORD.read("HybridEP")
        multiple = pad_multiple or 1
        rows = rows_of_expert(multiple) * ROUTING.local_experts
        gates = arrived(probs.reshape(-1, 1), rows).squeeze(1)
        return arrived(x, rows), gates, None, counts(multiple), x.shape

    def unpermuting_combine(x, handle, **_):
        return arrived(x, handle[0])

    token_dispatcher.fused_dispatch = dispatch
    token_dispatcher.fused_combine = combine
    token_dispatcher.set_deepep_num_sms = lambda number: None
    token_dispatcher.hybrid_ep_dispatch = permuting_dispatch
    token_dispatcher.hybrid_ep_combine = unpermuting_combine


def restore_orders(models):
    """Give dispatchers the orders of chunks that they keep on the host, which were built fake."""
    for module in (layer for model in models for layer in model.modules()):
        dispatcher = getattr(module, "token_dispatcher", None)
        order = getattr(dispatcher, "sort_input_by_local_experts", None)
        if order is None or order.is_cuda:
            continue
        experts, local = dispatcher.num_experts * dispatcher.tp_size, dispatcher.num_local_experts
        with unset_fake_temporarily():
            chunks = torch.arange(experts)
            dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
            dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()


def _replayed(graph):
    RECORD.launches["a graph"] += 1


@contextlib.contextmanager
def graphs():
    """megatron-core records, captures and replays graphs inside (`tests.graph_recorder`).

    Capture runs the operations once and fails where one would wait for the device. A replay is one
    launch: there are no numbers to compute again.
    """
    from megatron.core.transformer import cuda_graphs

    from tests.graph_recorder import CPUGraph, cpu_graphs

    describe = cuda_graphs.ArgMetadata.__init__

    def described(self, value):
        describe(self, value)
        if isinstance(value, FakeTensor):
            # It knows tensors by their exact type.
            self.type = torch.Tensor

    cuda_graphs.ArgMetadata.__init__ = described
    # Transformer Engine's takes the address of a tensor, and a fake one has none.
    cuda_graphs.make_weak_ref = lambda tensor: tensor
    try:
        with cpu_graphs(), mock.patch.object(CPUGraph, "replay", _replayed):
            # Put back by it too.
            torch.cuda.device_count = lambda: 1
            yield
    finally:
        cuda_graphs.ArgMetadata.__init__ = describe
