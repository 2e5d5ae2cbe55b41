"""Work of a weight on a rank's rows: products, and casts where they are in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moepp_megatron.workbench.planning.rates import Product, linear_products
from moepp_megatron.workbench.planning.workload import Workload

# Of casting a tensor to FP8: bytes an element (bf16 is read, rows and columns are written; for its
# largest value it is read before), and kernels: the cast; before it the largest value in two steps
# and the scale; after it the layout of the scales.
_CASTS = {"blockwise": (4.0, 1), "delayed": (4.0, 1), "tensorwise": (6.0, 4), "mxfp8": (4.0, 3)}
# With delayed scaling one kernel casts so many tensors (Transformer Engine, multi_cast_transpose.cu
# and `split_quantize`); with other scaling each group has its own.
_CAST_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class LinearWork:
    """Work of a weight.

    Attributes:
        forward: Products forward.
        backward: Products backward.
        moved: Bytes of casts to FP8 forward.
        moved_back: The same backward.
        casts: Kernels of the casts of one direction.
    """

    forward: tuple[Product, ...]
    backward: tuple[Product, ...]
    moved: float
    moved_back: float
    casts: int


def _product_number(load: Workload) -> str:
    """The format of the matrix products."""
    if load.numbers.fp8 is None:
        return load.numbers.dtype
    return {"blockwise": "fp8_blockwise", "mxfp8": "mxfp8"}.get(load.numbers.fp8, "fp8")


def linear_work(
    load: Workload, rows: float, outputs: float, inputs: float, groups: int = 1
) -> LinearWork:
    """Work of a weight [outputs, inputs] on `rows` rows per group."""
    number = _product_number(load)
    forward, backward = linear_products(rows, [(outputs, inputs)], number, groups)
    if load.numbers.fp8 is None:
        return LinearWork(forward, backward, 0.0, 0.0, 0)
    element, kernels = _CASTS[load.numbers.fp8]
    casts = ceil(groups / _CAST_TOGETHER) if load.numbers.fp8 == "delayed" else groups
    return LinearWork(
        forward,
        backward,
        element * rows * inputs * groups,
        element * rows * outputs * groups,
        # The weight's cast is kept over a step's micro-batches.
        kernels * casts,
    )
