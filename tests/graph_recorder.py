"""CUDA graphs on a CPU: what capture and replay mean, without a GPU.

`torch.cuda.graph` records the operations that reach a device, with the tensors they read and wrote;
`replay` runs them again on the same tensors. As on a GPU, Python beside them runs once, values come
from fixed addresses, and reading a value on the host is an error. megatron-core's own
`CudaGraphManager` runs on it. What it cannot show: streams, memory pools, collectives, kernels that
a GPU refuses to capture.
"""

import contextlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# Operators whose result is a number or a size that the host must know.
HOST_READS = ("_local_scalar_dense", "nonzero.default", "masked_select", "unique")


class CPUGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        self.operations = []
        self.replays = 0

    def register_generator_state(self, state):
        pass

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.operations:
            again = tree_flatten(function(*args, **kwargs))[0]
            returns = function._schema.returns
            if any(value.alias_info is not None for value in returns):
                continue  # A view, or written in place: the memory already holds it.
            for output, value in zip(outputs, again, strict=True):
                if torch.is_tensor(output):
                    output.detach().copy_(value)


class _Recording(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(name in str(function) for name in HOST_READS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        # gloo finishes a collective on the host, in operations that are not the graph's.
        assert function.namespace != "c10d", f"the recorder knows no collectives: {function}"
        result = function(*args, **kwargs)
        self._graph.operations.append((function, args, kwargs, tree_flatten(result)[0]))
        return result


@contextlib.contextmanager
def _capture(graph, **kwargs):
    with _Recording(graph):
        yield


@contextlib.contextmanager
def cpu_graphs():
    """megatron-core's local CUDA graphs work inside; none is left behind."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer import cuda_graphs

    def nothing(*args, **kwargs):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", CPUGraph)
        patch.setattr(torch.cuda, "graph", _capture)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
        patch.setattr(torch.cuda, "set_stream", nothing)
        patch.setattr(torch.cuda, "memory_stats", lambda: defaultdict(int))
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
            patch.setattr(torch._C, name, nothing, raising=False)
        # There is no generator of a GPU that a graph could take over.
        patch.setattr(cuda_graphs, "get_all_rng_states", dict)
        tracker = SimpleNamespace(is_inference_rng_tracker=True)
        patch.setattr(cuda_graphs, "get_cuda_rng_tracker", lambda: tracker)
        # It compares states of the CPU's generator, which on a GPU is no operation of the device.
        fork = staticmethod(lambda *args: contextlib.nullcontext())
        patch.setattr(CudaRNGStatesTracker, "fork", fork)
        try:
            yield
        finally:
            cuda_graphs.delete_cuda_graphs()


def graphs_of(module):
    """The forward graphs of all layers of a model."""
    return [
        runner.fwd_graph
        for part in module.modules()
        for runner in getattr(part, "cudagraph_runners", [])
    ]
