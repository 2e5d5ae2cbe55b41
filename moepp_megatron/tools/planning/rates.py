"""Times of kernels: matrix products by their shape, all others by their memory traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Literal

from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.workload import Workload

# Output tiles of the fast kernels on Hopper (CUTLASS, cuBLAS): a work group holds one at a time.
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))
# A smaller tile reads more of its operands for each product.
_TILE_SHARE = {256 * 128: 1.0, 128 * 128: 0.9, 128 * 64: 0.75, 64 * 64: 0.55}


@dataclass(frozen=True, slots=True)
class _Product:
    """Matrix products [m, k] x [k, n], `groups` of them in one kernel."""

    m: float  # rows of the result of one group; a mean, so not always whole
    n: float  # columns
    k: float  # inner dimension
    groups: int = 1  # number of products
    number: str = "bf16"  # format: fp32, bf16, fp8, fp8_blockwise or mxfp8

    @property
    def flop(self) -> float:
        """Floating-point operations of all groups."""
        return 2.0 * self.m * self.n * self.k * self.groups

    @property
    def moved(self) -> float:
        """Bytes read and written once."""
        size = {"fp32": 4, "bf16": 2, "fp8": 1, "fp8_blockwise": 1, "mxfp8": 1}[self.number]
        operands = self.m * self.k + self.n * self.k
        return self.groups * (size * operands + max(size, 2) * self.m * self.n)


def linear_products(
    rows: float, shapes: Sequence[tuple[float, float]], number: str, groups: int = 1
) -> tuple[tuple[_Product, ...], tuple[_Product, ...]]:
    """Forward and backward products of weights [n, k] on `rows` rows; gradients of inputs first."""
    forward = [_Product(rows, n, k, groups, number) for n, k in shapes]
    backward = [_Product(rows, k, n, groups, number) for n, k in shapes]
    backward += [_Product(n, k, rows, groups, number) for n, k in shapes]
    return tuple(forward), tuple(backward)


@lru_cache(maxsize=200_000)
def _product_seconds(product: _Product, machine: Machine) -> float:
    """Time of a product: its tiles in waves over the multiprocessors, or its bytes."""
    if product.flop == 0:
        return 0.0
    # The last wave is rarely full (NVIDIA, "Matrix Multiplication Background User's Guide", wave
    # quantization), a short inner dimension leaves little between filling and draining.
    share = max(_filled(product, tile, machine.multiprocessors) for tile in _TILES)
    share *= product.k / (product.k + machine.reached.depth)
    computing = product.flop / (machine.flops(product.number) * share)
    return max(computing, product.moved / machine.memory_rate)


def _filled(product: _Product, tile: tuple[int, int], multiprocessors: int) -> float:
    """Useful share of the tiles' work, times the efficiency of a tile of this size."""
    rows: float = ceil(product.m / tile[0])
    if product.groups > 1:
        # Groups differ in size: on average half a tile of each is empty.
        rows = max(product.m / tile[0] + 0.5, 1.0)
    tiles = rows * ceil(product.n / tile[1]) * product.groups
    waves = ceil(tiles / multiprocessors)
    # A product with few tiles and a long inner dimension is split along it.
    split = min(max(int(multiprocessors // tiles), 1), max(int(product.k // 1024), 1))
    slots = waves * multiprocessors if split == 1 else multiprocessors / split
    useful = product.m * product.n * product.groups
    return useful / (slots * tile[0] * tile[1]) * _TILE_SHARE[tile[0] * tile[1]]


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one part of one pass on a rank."""

    products: tuple[_Product, ...] = ()  # matrix products
    core_flop: float = 0.0  # FLOP of the attention's core, masked scores left out
    core_seq: int = 0  # sequence length of the core, which its speed depends on
    moved: float = 0.0  # bytes that kernels without products read and write
    kernels: int = 0  # kernels, the products' too
    # Whether the pass is backward, in which the attention's core is slower.
    is_backward: bool = False
    # Format of the core: it stays in bf16 where products are in FP8.
    core_number: Literal["fp32", "bf16"] = "bf16"

    def plus(self, *others: Work, moved: float = 0.0, kernels: int = 0) -> Work:
        """This work, that of others without a core, and further bytes and kernels."""
        return replace(
            self,
            products=self.products + sum((other.products for other in others), ()),
            moved=self.moved + sum(other.moved for other in others) + moved,
            kernels=self.kernels + sum(other.kernels for other in others) + kernels,
        )

    def seconds(self, machine: Machine) -> float:
        """Time of a part on one rank, without communication."""
        products = sum(_product_seconds(product, machine) for product in self.products)
        others = self.moved / machine.memory_rate + self.kernels * machine.reached.kernel_s
        return products + self.core_seconds(machine) + others

    def core_seconds(self, machine: Machine) -> float:
        """Time of only the attention's core."""
        if not self.core_flop:
            return 0.0
        share = machine.reached.attention_share(self.core_seq, self.is_backward)
        return self.core_flop / (machine.rated_flops(self.core_number) * share)


# By FP8 recipe: the products' format; of casting a tensor, bytes an element (bf16 is read, rows and
# columns are written; for its largest value it is read before), and kernels: the cast; before it
# the largest value in two steps and the scale; after it the layout of the scales.
_CASTS = {
    "blockwise": ("fp8_blockwise", 4.0, 1),
    "delayed": ("fp8", 4.0, 1),
    "tensorwise": ("fp8", 6.0, 4),
    "mxfp8": ("mxfp8", 4.0, 3),
}
# With delayed scaling a kernel casts this many tensors (Transformer Engine, in
# multi_cast_transpose.cu and `split_quantize`); with other scaling each group has its own.
_CAST_TOGETHER = 64


def linear_work(
    load: Workload, rows: float, outputs: float, inputs: float, groups: int = 1
) -> tuple[Work, Work]:
    """Forward and backward work of a weight [outputs, inputs] on `rows` rows per group.

    Its kernels are those of the casts; the products' are counted by who calls.
    """
    fp8, shapes = load.numbers.fp8, [(outputs, inputs)]
    if fp8 is None:
        plain = linear_products(rows, shapes, load.numbers.dtype, groups)
        return Work(plain[0]), Work(plain[1])
    number, element, kernels = _CASTS[fp8]
    forward, backward = linear_products(rows, shapes, number, groups)
    # The weight's cast is kept over a step's micro-batches.
    casts = kernels * (ceil(groups / _CAST_TOGETHER) if fp8 == "delayed" else groups)
    return (
        Work(forward, moved=element * rows * inputs * groups, kernels=casts),
        Work(backward, moved=element * rows * outputs * groups, kernels=casts),
    )
