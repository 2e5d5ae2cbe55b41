"""One kernel that counts a micro-batch's selections by the tags of its tokens, instead of a dozen.

The definition is `moepp_megatron.moe.token_tags.count_by_tags`. A program adds up its tile of
tokens for each tag and then adds that to the counters with atomic additions of integers, whose
order does not matter.

Bytes per token: reads 8 of its tag and E of the map. A program adds 2 numbers a group and E a
source.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

from moepp_megatron.moe.token_tags import SOURCE, TagCounts

# Tokens of a program, most columns of the map that it reads at once, and tags that it adds up at
# once: 16 numbers a thread.
_BLOCK_T, _MOST_COLUMNS, _BLOCK_TAGS, _WARPS = 128, 32, 32, 8


@torch.no_grad()
def count_by_tags(
    counts: TagCounts, selected: Tensor, tags: Tensor, num_ffn: int, padded: Tensor | None = None
) -> None:
    """Same as `moepp_megatron.moe.token_tags.count_by_tags`."""
    num_tokens, num_experts = selected.shape
    programs = triton.cdiv(num_tokens, _BLOCK_T)
    if programs:
        _moepp_count_tags[(programs,)](
            selected.contiguous(),
            tags.contiguous(),
            None if padded is None else padded.contiguous(),
            *counts,
            num_tokens,
            GROUPS=len(counts.groups),
            SOURCES=len(counts.sources),
            SOURCE_BIT=SOURCE,
            NUM_EXPERTS=num_experts,
            NUM_FFN=num_ffn,
            BLOCK_T=_BLOCK_T,
            BLOCK_E=min(_MOST_COLUMNS, triton.next_power_of_2(num_experts)),
            BLOCK_TAGS=_BLOCK_TAGS,
            num_warps=_WARPS,
        )


@triton.jit
def _moepp_count_tags(  # type: ignore[no-untyped-def]
    map_ptr,
    tags_ptr,
    padded_ptr,
    groups_ptr,
    sources_ptr,
    num_tokens,
    GROUPS: constexpr,
    SOURCES: constexpr,
    SOURCE_BIT: constexpr,
    NUM_EXPERTS: constexpr,
    NUM_FFN: constexpr,
    BLOCK_T: constexpr,
    BLOCK_E: constexpr,
    BLOCK_TAGS: constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    counts = token < num_tokens
    tag = tl.load(tags_ptr + token, counts, 0)
    if padded_ptr is not None:
        counts &= tl.load(padded_ptr + token, counts, 1) == 0
    group = (tag & ((1 << SOURCE_BIT) - 1)).to(tl.int32)
    source = (tag >> SOURCE_BIT).to(tl.int32)

    ffn = tl.zeros([BLOCK_T], tl.int32)
    for first in range(0, NUM_EXPERTS, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)
        exists = counts[:, None] & (column < NUM_EXPERTS)[None, :]
        is_ffn = (column < NUM_FFN)[None, :]
        at = token[:, None] * NUM_EXPERTS + column[None, :]
        selected = tl.load(map_ptr + at, exists, 0).to(tl.int32)
        ffn += tl.sum(tl.where(is_ffn, selected, 0), axis=1)
        for number in range(SOURCES):
            total = tl.sum(tl.where((source == number)[:, None], selected, 0), axis=0)
            out = sources_ptr + number * NUM_EXPERTS + column
            tl.atomic_add(out, total.to(tl.int64), column < NUM_EXPERTS, sem="relaxed")

    _add_up(groups_ptr, group, ffn, GROUPS, BLOCK_TAGS)
    _add_up(groups_ptr + 1, group, counts.to(tl.int32), GROUPS, BLOCK_TAGS)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    counts_ptr,
    number_of_token,
    values,
    NUMBERS: constexpr,
    BLOCK_TAGS: constexpr,
):
    """Add the values [BLOCK_T] of each number's tokens to its counter, every other one."""
    for first in range(0, NUMBERS, BLOCK_TAGS):
        number = first + tl.arange(0, BLOCK_TAGS)
        is_of = number_of_token[:, None] == number[None, :]
        total = tl.sum(tl.where(is_of, values[:, None], 0), axis=0).to(tl.int64)
        tl.atomic_add(counts_ptr + number * 2, total, number < NUMBERS, sem="relaxed")
