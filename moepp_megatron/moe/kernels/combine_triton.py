"""What `combine.py` launches. Tiles are [BLOCK_T tokens, BLOCK_D columns]; sums are in fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    mixing_ptr, token, is_token, c: tl.constexpr, scale, CONSTANTS: tl.constexpr
):  # fmt: skip
    """What constant expert c keeps of its input, and what it replaces: a softmax over two."""
    at = mixing_ptr + token * (2 * CONSTANTS) + 2 * c
    ahead = (tl.load(at, is_token, 0.0) - tl.load(at + 1, is_token, 0.0)) * scale
    return 1.0 / (1.0 + tl.exp(-ahead)), 1.0 / (1.0 + tl.exp(ahead))


@triton.jit
def _weight_of_input(  # type: ignore[no-untyped-def]
    gates_ptr, map_ptr, mixing_ptr, token, is_token, scale, NUM_EXPERTS: tl.constexpr,
    FIRST: tl.constexpr, CONSTANTS: tl.constexpr, COPIES: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The tokens' s, and which of them selected a copy or constant expert."""
    s = tl.zeros([BLOCK_T], tl.float32)
    used = tl.zeros([BLOCK_T], tl.int1)
    for c in tl.static_range(CONSTANTS + COPIES):
        at = token * NUM_EXPERTS + FIRST + c
        used = used | (tl.load(map_ptr + at, is_token, 0) != 0)
        gate = tl.load(gates_ptr + at, is_token, 0.0)
        if c < CONSTANTS:
            keep, _ = _shares(mixing_ptr, token, is_token, c, scale, CONSTANTS)
            gate = gate * keep
        s += gate
    return s * scale, used


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    rows_ptr, table_ptr, x_ptr, gates_ptr, map_ptr, mixing_ptr, v_ptr, addend_ptr, output_ptr,
    num_tokens, scale, HIDDEN: tl.constexpr, SLOTS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    FIRST: tl.constexpr, CONSTANTS: tl.constexpr, COPIES: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows, zero-computation experts and addend of the tile's tokens, added up."""
    # Neighbouring programs share tokens, so whole rows are read at about the same time.
    parts: tl.constexpr = (HIDDEN + BLOCK_D - 1) // BLOCK_D
    token = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = (tl.program_id(0) % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token, is_column = token < num_tokens, column < HIDDEN
    at = token[:, None] * HIDDEN + column[None, :]
    inside = is_token[:, None] & is_column[None, :]

    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = tl.load(table_ptr + token * SLOTS + slot, is_token, -1).to(tl.int64)
        of_row = rows_ptr + row[:, None] * HIDDEN + column[None, :]
        total += tl.load(of_row, inside & (row >= 0)[:, None], 0.0).to(tl.float32)
    if x_ptr is not None:
        s, used = _weight_of_input(
            gates_ptr, map_ptr, mixing_ptr, token, is_token, scale, NUM_EXPERTS, FIRST, CONSTANTS,
            COPIES, BLOCK_T,
        )  # fmt: skip
        total += s[:, None] * tl.load(x_ptr + at, inside & used[:, None], 0.0).to(tl.float32)
        for c in tl.static_range(CONSTANTS):
            gate = tl.load(gates_ptr + token * NUM_EXPERTS + FIRST + c, is_token, 0.0)
            _, replace = _shares(mixing_ptr, token, is_token, c, scale, CONSTANTS)
            v = tl.load(v_ptr + c * HIDDEN + column, is_column, 0.0).to(tl.float32)
            total += (gate * replace)[:, None] * v[None, :]
    if addend_ptr is not None:
        total += tl.load(addend_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(output_ptr + at, total, inside)


@triton.jit
def backward(  # type: ignore[no-untyped-def]
    grad_ptr, table_ptr, x_ptr, gates_ptr, map_ptr, mixing_ptr, v_ptr, grad_rows_ptr, grad_x_ptr,
    weights_ptr, vectors_ptr, num_tokens, scale, HIDDEN: tl.constexpr, SLOTS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, FIRST: tl.constexpr, CONSTANTS: tl.constexpr,
    COPIES: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of rows and x; this program's part of those of s and A, and of V."""
    parts: tl.constexpr = (HIDDEN + BLOCK_D - 1) // BLOCK_D
    chunk = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    constant = tl.arange(0, BLOCK_C)
    is_column = column < HIDDEN

    vectors = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for start in range(0, CHUNK, BLOCK_T):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        at = token[:, None] * HIDDEN + column[None, :]
        inside = is_token[:, None] & is_column[None, :]
        grad = tl.load(grad_ptr + at, inside, 0.0)
        for slot in tl.static_range(SLOTS):
            row = tl.load(table_ptr + token * SLOTS + slot, is_token, -1).to(tl.int64)
            of_row = grad_rows_ptr + row[:, None] * HIDDEN + column[None, :]
            tl.store(of_row, grad, inside & (row >= 0)[:, None])
        grad = grad.to(tl.float32)
        if x_ptr is not None:
            s, used = _weight_of_input(
                gates_ptr, map_ptr, mixing_ptr, token, is_token, scale, NUM_EXPERTS, FIRST,
                CONSTANTS, COPIES, BLOCK_T,
            )  # fmt: skip
            tl.store(grad_x_ptr + at, s[:, None] * grad, inside)
            x = tl.load(x_ptr + at, inside & used[:, None], 0.0).to(tl.float32)
            weight = weights_ptr + (part.to(tl.int64) * num_tokens + token) * (1 + CONSTANTS)
            tl.store(weight, tl.sum(grad * x, axis=1), is_token)
            for c in tl.static_range(CONSTANTS):
                v = tl.load(v_ptr + c * HIDDEN + column, is_column, 0.0).to(tl.float32)
                tl.store(weight + 1 + c, tl.sum(grad * v[None, :], axis=1), is_token)
                gate = tl.load(gates_ptr + token * NUM_EXPERTS + FIRST + c, is_token, 0.0)
                _, replace = _shares(mixing_ptr, token, is_token, c, scale, CONSTANTS)
                summed = tl.sum((gate * replace)[:, None] * grad, axis=0)
                vectors += tl.where((constant == c)[:, None], summed[None, :], 0.0)
    if CONSTANTS > 0:
        out = vectors_ptr + (chunk * CONSTANTS + constant[:, None]) * HIDDEN + column[None, :]
        tl.store(out, vectors, (constant < CONSTANTS)[:, None] & is_column[None, :])


@triton.jit
def backward_of_weights(  # type: ignore[no-untyped-def]
    weights_ptr, gates_ptr, mixing_ptr, grad_gates_ptr, grad_mixing_ptr, num_tokens, scale,
    NUM_EXPERTS: tl.constexpr, FIRST: tl.constexpr, CONSTANTS: tl.constexpr,
    COPIES: tl.constexpr, PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradients of gates and mixing logits from those of s and A, which come in parts."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    is_token = token < num_tokens
    of_s = tl.zeros([BLOCK_T], tl.float32)
    for part in range(PARTS):
        at = (part * tl.cast(num_tokens, tl.int64) + token) * (1 + CONSTANTS)
        of_s += tl.load(weights_ptr + at, is_token, 0.0)
    of_s = of_s * scale
    # FFN and zero experts have no part in s and A; a copy expert's gate is a summand of s.
    is_copy = (expert >= FIRST + CONSTANTS) & (expert < FIRST + CONSTANTS + COPIES)
    grad_gates = tl.where(is_copy[None, :], of_s[:, None], 0.0)
    for c in tl.static_range(CONSTANTS):
        of_a = tl.zeros([BLOCK_T], tl.float32)
        for part in range(PARTS):
            at = (part * tl.cast(num_tokens, tl.int64) + token) * (1 + CONSTANTS)
            of_a += tl.load(weights_ptr + at + 1 + c, is_token, 0.0)
        keep, replace = _shares(mixing_ptr, token, is_token, c, scale, CONSTANTS)
        of_gate = keep * of_s + replace * of_a
        grad_gates += tl.where((expert == FIRST + c)[None, :], of_gate[:, None], 0.0)
        gate = tl.load(gates_ptr + token * NUM_EXPERTS + FIRST + c, is_token, 0.0)
        ahead = gate * (of_s - of_a) * keep * replace * scale
        out = grad_mixing_ptr + token * (2 * CONSTANTS) + 2 * c
        tl.store(out, ahead, is_token)
        tl.store(out + 1, -ahead, is_token)
    at_gate = token[:, None] * NUM_EXPERTS + expert[None, :]
    inside = is_token[:, None] & (expert < NUM_EXPERTS)[None, :]
    tl.store(grad_gates_ptr + at_gate, grad_gates, inside)
