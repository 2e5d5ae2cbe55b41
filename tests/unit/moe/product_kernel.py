"""A kernel around only `combine_triton._product`; imported where Triton is interpreted."""

import triton
import triton.language as tl

from moepp_megatron.moe.kernels.combine_triton import _product


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, WIDEN: tl.constexpr):
    """[16, 16] product of [16, 32] and [32, 16]."""
    side, inner = tl.arange(0, 16), tl.arange(0, 32)
    a = tl.load(a_ptr + side[:, None] * 32 + inner[None, :])
    b = tl.load(b_ptr + inner[:, None] * 16 + side[None, :])
    tl.store(c_ptr + side[:, None] * 16 + side[None, :], _product(a, b, WIDEN))
