"""Kernels that `combine.py` launches. Tiles are [BLOCK_T tokens, BLOCK_D columns]; sums are fp32.

Constant and copy experts are the columns of tiles [BLOCK_T, BLOCK_C], padded to a power of two, and
A V and the two products of its backward pass are products of matrices. Matrix units of a GPU
multiply only bf16 without loss, so fp32 factors are cut into three bf16 numbers of 8 bits each.
"""

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def _product(a, b, WIDEN: constexpr):  # type: ignore[no-untyped-def]
    """A b from fp32 or bf16 factors, as exact as fp32; WIDEN for Triton's interpreter."""
    if a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = _product_of_like(low, b, WIDEN)
        total += _product_of_like(middle, b, WIDEN)
        return total + _product_of_like(high, b, WIDEN)
    return _product_of_like(a, b, WIDEN)


@triton.jit
def _product_of_like(a, b, WIDEN: constexpr):  # type: ignore[no-untyped-def]
    if WIDEN or a.dtype != tl.bfloat16 or b.dtype != tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # Without "ieee", fp32 factors would be cut to the 11 bits of TF32.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    mixing_ptr, token, is_token, scale, CONSTANTS: constexpr, BLOCK_C: constexpr
):
    """[tokens, BLOCK_C] kept and replaced parts of the input: a softmax; 1 and 0 elsewhere."""
    constant = tl.arange(0, BLOCK_C)
    keep = tl.full([token.shape[0], BLOCK_C], 1.0, tl.float32)
    replace = tl.zeros([token.shape[0], BLOCK_C], tl.float32)
    if CONSTANTS > 0:
        at = mixing_ptr + token[:, None] * (2 * CONSTANTS) + 2 * constant[None, :]
        exists = is_token[:, None] & (constant < CONSTANTS)[None, :]
        ahead = (tl.load(at, exists, 0.0) - tl.load(at + 1, exists, 0.0)) * scale
        keep = tl.where((constant < CONSTANTS)[None, :], 1.0 / (1.0 + tl.exp(-ahead)), keep)
        replace = tl.where((constant < CONSTANTS)[None, :], 1.0 / (1.0 + tl.exp(ahead)), replace)
    return keep, replace


@triton.jit
def _local_weights(  # type: ignore[no-untyped-def]
    gates_ptr,
    map_ptr,
    mixing_ptr,
    token,
    is_token,
    scale,
    NUM_EXPERTS: constexpr,
    FIRST: constexpr,
    CONSTANTS: constexpr,
    COPIES: constexpr,
    BLOCK_C: constexpr,
):
    """The tokens' s, their A, and which of them selected a copy or constant expert."""
    expert = tl.arange(0, BLOCK_C)
    at = token[:, None] * NUM_EXPERTS + FIRST + expert[None, :]
    exists = is_token[:, None] & (expert < CONSTANTS + COPIES)[None, :]
    used = tl.max(tl.load(map_ptr + at, exists, 0).to(tl.int32), axis=1) != 0
    gates = tl.load(gates_ptr + at, exists, 0.0)
    keep, replace = _shares(mixing_ptr, token, is_token, scale, CONSTANTS, BLOCK_C)
    return tl.sum(gates * keep, axis=1) * scale, gates * replace, used


@triton.jit
def _place(num_tokens, HIDDEN: constexpr, CHUNK: constexpr, BLOCK_D: constexpr):  # type: ignore[no-untyped-def]
    """This program's chunk of tokens and its part of the columns: numbers, and the columns."""
    # Neighbouring programs share tokens, so whole rows are read at about the same time.
    parts: constexpr = (HIDDEN + BLOCK_D - 1) // BLOCK_D
    part = tl.program_id(0) % parts
    return (tl.program_id(0) // parts).to(tl.int64), part, part * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def _constants(  # type: ignore[no-untyped-def]
    v_ptr, column, HIDDEN: constexpr, CONSTANTS: constexpr, BLOCK_C: constexpr
):
    """[BLOCK_C, BLOCK_D] of V."""
    constant = tl.arange(0, BLOCK_C)
    exists = (constant < CONSTANTS)[:, None] & (column < HIDDEN)[None, :]
    return tl.load(v_ptr + constant[:, None] * HIDDEN + column[None, :], exists, 0.0)


@triton.jit
def moepp_combine_forward(  # type: ignore[no-untyped-def]
    rows_ptr,
    table_ptr,
    x_ptr,
    gates_ptr,
    map_ptr,
    mixing_ptr,
    v_ptr,
    addend_ptr,
    output_ptr,
    num_tokens,
    scale,
    HIDDEN: constexpr,
    SLOTS: constexpr,
    NUM_EXPERTS: constexpr,
    FIRST: constexpr,
    CONSTANTS: constexpr,
    COPIES: constexpr,
    BLOCK_C: constexpr,
    CHUNK: constexpr,
    BLOCK_T: constexpr,
    BLOCK_D: constexpr,
    WIDEN: constexpr,
):
    """Rows, zero-computation experts and addend of the chunk's tokens, added up."""
    chunk, _, column = _place(num_tokens, HIDDEN, CHUNK, BLOCK_D)
    if CONSTANTS > 0:
        v = _constants(v_ptr, column, HIDDEN, CONSTANTS, BLOCK_C)
    for start in range(0, CHUNK, BLOCK_T):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        at = token[:, None] * HIDDEN + column[None, :]
        inside = is_token[:, None] & (column < HIDDEN)[None, :]
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for slot in tl.static_range(SLOTS):
            row = tl.load(table_ptr + token * SLOTS + slot, is_token, -1).to(tl.int64)
            of_row = rows_ptr + row[:, None] * HIDDEN + column[None, :]
            total += tl.load(of_row, inside & (row >= 0)[:, None], 0.0).to(tl.float32)
        if x_ptr is not None:
            s, of_constants, used = _local_weights(
                gates_ptr,
                map_ptr,
                mixing_ptr,
                token,
                is_token,
                scale,
                NUM_EXPERTS,
                FIRST,
                CONSTANTS,
                COPIES,
                BLOCK_C,
            )
            total += s[:, None] * tl.load(x_ptr + at, inside & used[:, None], 0.0).to(tl.float32)
            if CONSTANTS > 0:
                total += _product(of_constants, v, WIDEN)
        if addend_ptr is not None:
            total += tl.load(addend_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(output_ptr + at, total, inside)


@triton.jit
def moepp_combine_backward(  # type: ignore[no-untyped-def]
    grad_ptr,
    table_ptr,
    x_ptr,
    gates_ptr,
    map_ptr,
    mixing_ptr,
    v_ptr,
    grad_rows_ptr,
    grad_x_ptr,
    weights_ptr,
    vectors_ptr,
    num_tokens,
    scale,
    HIDDEN: constexpr,
    SLOTS: constexpr,
    NUM_EXPERTS: constexpr,
    FIRST: constexpr,
    CONSTANTS: constexpr,
    COPIES: constexpr,
    BLOCK_C: constexpr,
    CHUNK: constexpr,
    BLOCK_T: constexpr,
    BLOCK_D: constexpr,
    WIDEN: constexpr,
):
    """Gradients of rows and x; this program's part of those of s and A, and of V."""
    chunk, part, column = _place(num_tokens, HIDDEN, CHUNK, BLOCK_D)
    constant = tl.arange(0, BLOCK_C)
    is_constant = constant < CONSTANTS
    if CONSTANTS > 0:
        v = _constants(v_ptr, column, HIDDEN, CONSTANTS, BLOCK_C)
    vectors = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        at = token[:, None] * HIDDEN + column[None, :]
        inside = is_token[:, None] & (column < HIDDEN)[None, :]
        grad = tl.load(grad_ptr + at, inside, 0.0)
        for slot in tl.static_range(SLOTS):
            row = tl.load(table_ptr + token * SLOTS + slot, is_token, -1).to(tl.int64)
            of_row = grad_rows_ptr + row[:, None] * HIDDEN + column[None, :]
            tl.store(of_row, grad, inside & (row >= 0)[:, None])
        if x_ptr is not None:
            s, of_constants, used = _local_weights(
                gates_ptr,
                map_ptr,
                mixing_ptr,
                token,
                is_token,
                scale,
                NUM_EXPERTS,
                FIRST,
                CONSTANTS,
                COPIES,
                BLOCK_C,
            )
            wide = grad.to(tl.float32)
            tl.store(grad_x_ptr + at, s[:, None] * wide, inside)
            x = tl.load(x_ptr + at, inside & used[:, None], 0.0).to(tl.float32)
            weight = weights_ptr + (part.to(tl.int64) * num_tokens + token) * (1 + CONSTANTS)
            tl.store(weight, tl.sum(wide * x, axis=1), is_token)
            if CONSTANTS > 0:
                of_a = _product(grad, tl.trans(v), WIDEN)
                at_a = weight[:, None] + 1 + constant[None, :]
                tl.store(at_a, of_a, is_token[:, None] & is_constant[None, :])
                vectors += _product(tl.trans(of_constants), grad, WIDEN)
    if CONSTANTS > 0:
        out = vectors_ptr + (chunk * CONSTANTS + constant[:, None]) * HIDDEN + column[None, :]
        tl.store(out, vectors, is_constant[:, None] & (column < HIDDEN)[None, :])


@triton.jit
def moepp_combine_backward_of_weights(  # type: ignore[no-untyped-def]
    weights_ptr,
    gates_ptr,
    mixing_ptr,
    grad_gates_ptr,
    grad_mixing_ptr,
    num_tokens,
    scale,
    NUM_EXPERTS: constexpr,
    FIRST: constexpr,
    CONSTANTS: constexpr,
    COPIES: constexpr,
    PARTS: constexpr,
    BLOCK_T: constexpr,
    BLOCK_C: constexpr,
):
    """Gradients of gates and mixing logits from those of s and A, which come in parts."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_C)
    is_token = token < num_tokens
    is_constant = is_token[:, None] & (expert < CONSTANTS)[None, :]
    of_s = tl.zeros([BLOCK_T], tl.float32)
    of_a = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for part in range(PARTS):
        at = weights_ptr + (part * tl.cast(num_tokens, tl.int64) + token) * (1 + CONSTANTS)
        of_s += tl.load(at, is_token, 0.0)
        if CONSTANTS > 0:
            of_a += tl.load(at[:, None] + 1 + expert[None, :], is_constant, 0.0)
    of_s = (of_s * scale)[:, None]
    keep, replace = _shares(mixing_ptr, token, is_token, scale, CONSTANTS, BLOCK_C)
    at_gate = token[:, None] * NUM_EXPERTS + FIRST + expert[None, :]
    local = is_token[:, None] & (expert < CONSTANTS + COPIES)[None, :]
    tl.store(grad_gates_ptr + at_gate, keep * of_s + replace * of_a, local)
    if CONSTANTS > 0:
        gates = tl.load(gates_ptr + at_gate, is_constant, 0.0)
        ahead = gates * (of_s - of_a) * keep * replace * scale
        out = grad_mixing_ptr + token[:, None] * (2 * CONSTANTS) + 2 * expert[None, :]
        tl.store(out, ahead, is_constant)
        tl.store(out + 1, -ahead, is_constant)
    # FFN and zero experts have no part in s and A.
    for first in range(0, NUM_EXPERTS, BLOCK_C):
        other = first + expert
        other_kind = (other < FIRST) | (other >= FIRST + CONSTANTS + COPIES)
        out = grad_gates_ptr + token[:, None] * NUM_EXPERTS + other[None, :]
        nothing = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        tl.store(out, nothing, is_token[:, None] & (other_kind & (other < NUM_EXPERTS))[None, :])
