"""Finds each token's rows for `kernels.combine`, in two small launches instead of a dozen.

The definition is `moepp_megatron.moe.copies.rows_of_tokens`. Programs first count their tokens'
rows, then each adds up the counts of those before it, which it reads from the cache: 4 bytes for
each column of each program. So there are no more programs than processors, and a program takes
as many tiles of tokens as that needs.

Bytes per token: reads the map twice, writes 4 for each slot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

# Entries of a tile, 16 a thread (32 do not fit into registers), and most tokens of it.
_TILE, _MOST_TOKENS = 2048, 128
# Programs whose counts are read at once, and programs to aim at where a tile takes few tokens.
_BLOCK_P, _PROGRAMS = 32, 128


def rows_of_tokens(routing_map: Tensor, slots: int) -> Tensor:
    """Same as `moepp_megatron.moe.copies.rows_of_tokens`; the map may be a slice of columns."""
    num_tokens, num_columns = routing_map.shape
    table = torch.empty(num_tokens, slots, dtype=torch.int32, device=routing_map.device)
    block_m = triton.next_power_of_2(num_columns)
    block_t = min(_MOST_TOKENS, max(1, _TILE // block_m))
    tiles = triton.next_power_of_2(triton.cdiv(num_tokens, block_t * _PROGRAMS) or 1)
    programs = triton.cdiv(num_tokens, block_t * tiles)
    counts = table.new_empty(programs, num_columns)
    if routing_map.stride(1) != 1:
        routing_map = routing_map.contiguous()
    sizes = {"COLUMNS": num_columns, "TILES": tiles, "BLOCK_T": block_t, "BLOCK_M": block_m}
    if programs:
        stride = routing_map.stride(0)
        _moepp_count_rows[(programs,)](routing_map, counts, num_tokens, stride, **sizes)
        _moepp_number_rows[(programs,)](
            routing_map,
            counts,
            table,
            num_tokens,
            stride,
            programs,
            SLOTS=slots,
            BLOCK_S=triton.next_power_of_2(slots),
            BLOCK_P=_BLOCK_P,
            **sizes,
        )
    return table


@triton.jit
def _selected(  # type: ignore[no-untyped-def]
    map_ptr,
    num_tokens,
    stride,
    tile,
    COLUMNS: constexpr,
    TILES: constexpr,
    BLOCK_T: constexpr,
    BLOCK_M: constexpr,
):
    """[BLOCK_T, BLOCK_M] int32, 1 where the tile's tokens have a row, and their numbers."""
    token = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_M)
    exists = (token < num_tokens)[:, None] & (column < COLUMNS)[None, :]
    selected = tl.load(map_ptr + token[:, None] * stride + column[None, :], exists, 0)
    return selected.to(tl.int32), token


@triton.jit
def _moepp_count_rows(  # type: ignore[no-untyped-def]
    map_ptr,
    counts_ptr,
    num_tokens,
    stride,
    COLUMNS: constexpr,
    TILES: constexpr,
    BLOCK_T: constexpr,
    BLOCK_M: constexpr,
):
    column = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M], tl.int32)
    for tile in range(TILES):
        selected, _ = _selected(map_ptr, num_tokens, stride, tile, COLUMNS, TILES, BLOCK_T, BLOCK_M)
        total += tl.sum(selected, axis=0)
    tl.store(counts_ptr + tl.program_id(0) * COLUMNS + column, total, column < COLUMNS)


@triton.jit
def _moepp_number_rows(  # type: ignore[no-untyped-def]
    map_ptr,
    counts_ptr,
    table_ptr,
    num_tokens,
    stride,
    programs,
    COLUMNS: constexpr,
    SLOTS: constexpr,
    TILES: constexpr,
    BLOCK_T: constexpr,
    BLOCK_M: constexpr,
    BLOCK_S: constexpr,
    BLOCK_P: constexpr,
):
    column = tl.arange(0, BLOCK_M)
    # Rows of each column: all, and those of tokens before this program's.
    total = tl.zeros([BLOCK_M], tl.int32)
    before = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        exists = (program < programs)[:, None] & (column < COLUMNS)[None, :]
        at = program[:, None] * COLUMNS + column[None, :]
        counts = tl.load(counts_ptr + at, exists, 0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((program < tl.program_id(0))[:, None], counts, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total + before

    slots = tl.arange(0, BLOCK_S)
    for tile in range(TILES):
        selected, token = _selected(
            map_ptr, num_tokens, stride, tile, COLUMNS, TILES, BLOCK_T, BLOCK_M
        )
        number = first[None, :] + tl.cumsum(selected, axis=0) - selected
        slot = tl.cumsum(selected, axis=1) - selected
        at = table_ptr + token[:, None] * SLOTS + slot
        tl.store(at, number, (selected != 0) & (slot < SLOTS))
        left = (slots < SLOTS)[None, :] & (slots[None, :] >= tl.sum(selected, axis=1)[:, None])
        at_slot = table_ptr + token[:, None] * SLOTS + slots[None, :]
        tl.store(at_slot, -1, left & (token < num_tokens)[:, None])
        first += tl.sum(selected, axis=0)
