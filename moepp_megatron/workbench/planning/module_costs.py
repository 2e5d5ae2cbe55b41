"""Memory traffic and kernels of modules beside their products, fused ones and a CPU's."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.workbench.planning.workload import Modules


@dataclass(frozen=True)
class ModuleCosts:
    """Passes over a tensor (a read or a write of all of it) and kernels, forward and backward.

    Attributes:
        norms: Passes over [T, D] of two norms and two additions to the residual stream.
        norm_kernels: Kernels of the same norms and additions.
        norms_again: Passes and kernels of the norms where the backward pass repeats them.
        rotation: Rotations' reads and writes of queries and keys, in units of one of each.
        experts: Passes over [rows, I] between an FFN expert's two products.
        chain: The same of an FFN that is a chain of modules: dense, shared, vanilla experts.
        layer_kernels: Kernels of all experts of a rank together.
        expert_kernels: Kernels of each expert.
        accumulated: Bytes of adding an element of a weight's gradient to the reduced buffer.
        table: Bytes of an element of the embedding's gradient beyond the rows that were read.
    """

    norms: tuple[float, float]
    norm_kernels: tuple[int, int]
    norms_again: tuple[float, int]
    rotation: int
    experts: tuple[int, int]
    chain: tuple[int, int]
    layer_kernels: tuple[int, int]
    expert_kernels: tuple[int, int]
    accumulated: float
    table: float


COSTS: dict[Modules, ModuleCosts] = {
    "fused": ModuleCosts(
        norms=(10.0, 10.0),
        norm_kernels=(4, 6),
        norms_again=(4.0, 2),
        rotation=1,
        experts=(3, 6),
        chain=(3, 6),
        # One product an expert and matrix, issued over a few streams (Transformer Engine,
        # common/gemm/cublaslt_gemm.cu, multi_stream_cublas_gemm); backward two.
        layer_kernels=(4, 6),
        expert_kernels=(2, 4),
        accumulated=0.0,
        table=0.0,
    ),
    # A norm is five elementwise operations; a rotation two products by halves and a sum; silu,
    # product and gate are operations of their own, with what splits and joins the halves; experts
    # run one after the other.
    "local": ModuleCosts(
        norms=(20.0, 36.0),
        norm_kernels=(14, 30),
        norms_again=(20.0, 14),
        rotation=3,
        experts=(8, 18),
        chain=(14, 30),
        layer_kernels=(0, 0),
        expert_kernels=(8, 18),
        # A fresh gradient is read and added to the buffer's, all in fp32.
        accumulated=12.0,
        # A whole table of gradients is made, most of them 0.
        table=4.0,
    ),
}
