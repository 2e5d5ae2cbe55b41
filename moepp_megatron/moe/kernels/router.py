"""One kernel from router logits to gates, routing map and statistics, and one for its gradient.

The definition is `moepp_megatron.moe.selection`: about 25 PyTorch operations forward on a few bytes
per token, so that on a GPU nearly all of their time is launches. The residual G z is added by the
matrix product that computes it, before this kernel.

Selection is the same, ties included: keys are built from the scores' bits as in `_top_experts`. The
scores themselves may differ from PyTorch's in the last bit, which can decide between two scores
that are that close. NaN counts as the largest score.

Bytes per token: forward reads 4E, writes 5E; backward reads 9E, writes 4E. Forward also writes and
reads 8E bytes of sums for each program: at 4096 tokens E/4 of 12 experts, E from 64 experts on, and
less with more tokens. Nothing but logits and map is kept for the backward pass, which computes the
scores again.

Shape suffixes: T tokens, E experts, S sequences that are counted separately.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language import constexpr

from moepp_megatron.experts import ZERO
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.kernels.expert_groups import in_best_groups
from moepp_megatron.moe.kernels.scores import (
    SCORES,
    grad_of_logs,
    log_scores,
    scores_of,
    shares_of,
    slope_of_logs,
)
from moepp_megatron.moe.selection import Routing

# Elements of a program's tile [tokens, experts]. It moves few bytes and waits for reductions, so
# many small programs finish first: 4096 tokens of 12 experts are 128 programs on 132 processors.
_TILE = 512
# Programs to aim at where a tile has few tokens, four on each processor: each writes a row of sums.
_PROGRAMS = 512

# Below every key: experts that are selected already, and columns that are no experts.
_LOWEST = constexpr(-(2**62))


def select(
    logits: Tensor,
    bias: Tensor | None,
    config: MoEPPConfig,
    num_sequences: int | None,
    padded: Tensor | None = None,
) -> Routing:
    """Same as `moepp_megatron.moe.selection.select`; logits must be fp32."""
    assert logits.dtype == torch.float32, f"logits must be fp32, not {logits.dtype}"
    padded = None if padded is None else padded.contiguous()
    arguments = (logits.contiguous(), bias, padded, config, num_sequences or 0)
    routing = Routing(*_Select.apply(*arguments))
    if num_sequences is None:
        return routing._replace(counts=None, score_sums=None)
    return routing


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        padded: Tensor | None,
        config: MoEPPConfig,
        num_sequences: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gates = torch.empty_like(logits)
        routing_map = torch.empty_like(logits, dtype=torch.bool)
        ctx.config, ctx.num_sequences = config, max(num_sequences, 1)
        positions, blocks, settings = _launch(logits, config, ctx.num_sequences)
        tiles = triton.next_power_of_2(triton.cdiv(blocks * ctx.num_sequences, _PROGRAMS) or 1)
        blocks = triton.cdiv(blocks, tiles)
        partial = None
        if num_sequences:
            partial = logits.new_empty(blocks, num_sequences, 2, logits.shape[1])
        if blocks:
            _moepp_select_forward[(blocks, ctx.num_sequences)](
                logits,
                bias,
                padded,
                gates,
                routing_map,
                partial,
                positions,
                ctx.num_sequences,
                config.gate_scale,
                TOPK=config.router_topk,
                TILES=tiles,
                **_groups(config),
                **settings,
            )
        # One order of addition on every run: a program's tokens, then the programs.
        totals = logits.new_empty(2, 0) if partial is None else partial.sum(dim=0).transpose(0, 1)
        counts, sums = totals.unbind()
        ctx.save_for_backward(logits, padded, routing_map)
        ctx.mark_non_differentiable(routing_map, counts)
        ctx.set_materialize_grads(False)
        return gates, routing_map, counts, sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_gates: Tensor | None, _map: None, _counts: None, grad_sums: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None]:
        if grad_gates is None and grad_sums is None:
            return None, None, None, None, None
        logits, padded, routing_map = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        positions, blocks, settings = _launch(logits, ctx.config, ctx.num_sequences)
        if blocks:
            _moepp_select_backward[(blocks, ctx.num_sequences)](
                logits,
                padded,
                routing_map,
                None if grad_gates is None else grad_gates.contiguous(),
                None if grad_sums is None else grad_sums.contiguous(),
                grad_logits,
                positions,
                ctx.num_sequences,
                ctx.config.gate_scale,
                **settings,
            )
        return grad_logits, None, None, None, None


def _launch(
    logits: Tensor, config: MoEPPConfig, num_sequences: int
) -> tuple[int, int, dict[str, Any]]:
    """Positions of a sequence, tiles that share them, compile-time constants of both kernels."""
    num_tokens, num_experts = logits.shape
    assert num_tokens % num_sequences == 0, (
        f"{num_tokens} tokens are not {num_sequences} sequences of one length"
    )
    if config.score_function not in SCORES:
        raise ValueError(
            f"score_function ({config.score_function}) must be {' or '.join(SCORES)} for the "
            "router's kernel; set fused to False, or write it in moe/kernels/scores.py"
        )
    positions = num_tokens // num_sequences
    block_e = triton.next_power_of_2(num_experts)
    block_t = max(1, _TILE // block_e)
    # Where the experts end whose gates count in the normalisation.
    ends = {"none": num_experts, "selected": num_experts, "nonzero": config.columns(ZERO).start}
    settings = {
        "NUM_EXPERTS": num_experts,
        "SCORE": config.score_function,
        "NORMALIZED": config.gate_normalization != "none",
        "END": ends[config.gate_normalization],
        "BLOCK_T": block_t,
        "BLOCK_E": block_e,
    }
    return positions, triton.cdiv(positions, block_t), settings


def _groups(config: MoEPPConfig) -> dict[str, int]:
    """Compile-time constants of group-limited selection; one group if not limited."""
    return {
        "NUM_FFN": config.num_ffn_experts,
        "GROUPS": config.num_groups if config.limits_groups else 1,
        "KEPT": config.group_topk,
        "RANKED": config.router_topk // config.group_topk if config.limits_groups else 1,
    }


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    padded_ptr,
    tile,
    positions,
    sequences,
    NUM_EXPERTS: constexpr,
    BLOCK_T: constexpr,
    BLOCK_E: constexpr,
):
    """A tile's offsets in [T, E], masks of what exists and of what routes, and columns."""
    position = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)
    token = position.to(tl.int64) * sequences + tl.program_id(1)
    exists = (position < positions)[:, None] & (column < NUM_EXPERTS)[None, :]
    routes = exists
    if padded_ptr is not None:
        routes = exists & (tl.load(padded_ptr + token, position < positions, 0) == 0)[:, None]
    return token[:, None] * NUM_EXPERTS + column[None, :], exists, routes, column


@triton.jit
def _moepp_select_forward(  # type: ignore[no-untyped-def]
    logits_ptr,
    bias_ptr,
    padded_ptr,
    gates_ptr,
    map_ptr,
    partial_ptr,
    positions,
    sequences,
    scale,
    NUM_EXPERTS: constexpr,
    TOPK: constexpr,
    SCORE: constexpr,
    NORMALIZED: constexpr,
    END: constexpr,
    TILES: constexpr,
    NUM_FFN: constexpr,
    GROUPS: constexpr,
    KEPT: constexpr,
    RANKED: constexpr,
    BLOCK_T: constexpr,
    BLOCK_E: constexpr,
):
    """Gates and map of the program's tiles, and the sums of what they chose and of their scores."""
    column = tl.arange(0, BLOCK_E)
    counts = tl.zeros([BLOCK_E], tl.float32)
    sums = tl.zeros([BLOCK_E], tl.float32)
    for tile in range(TILES):
        at, exists, routes, column = _tile(
            padded_ptr,
            tl.program_id(0) * TILES + tile,
            positions,
            sequences,
            NUM_EXPERTS,
            BLOCK_T,
            BLOCK_E,
        )
        is_expert = (column < NUM_EXPERTS)[None, :]
        logits = tl.load(logits_ptr + at, exists, 0.0)
        scores = scores_of(logits, column, NUM_EXPERTS, SCORE)

        ranked = logits
        if bias_ptr is not None:
            ranked = scores + tl.load(bias_ptr + column, column < NUM_EXPERTS, 0.0)[None, :]
        # A float's bits order as the float does once negative ones are turned around and -0 is 0.
        ranked = tl.where(ranked == 0.0, 0.0, ranked)
        bits = ranked.to(tl.int32, bitcast=True)
        bits = tl.where(ranked != ranked, 0x7FC00000, bits)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
        # No two keys of a token are equal: between equal scores the first expert's is larger.
        keys = order * NUM_EXPERTS + (NUM_EXPERTS - 1 - column)[None, :]
        allowed = is_expert
        if GROUPS > 1:
            affinities = ranked
            if bias_ptr is None:
                if SCORE == "softmax":
                    affinities = shares_of(logits, (column < NUM_FFN)[None, :])
                else:
                    affinities = scores
            allowed &= in_best_groups(affinities, column, NUM_FFN, GROUPS, KEPT, RANKED, BLOCK_E)
        keys = tl.where(allowed, keys, _LOWEST)
        chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.int1)
        for _ in tl.static_range(TOPK):
            pick = keys == tl.max(keys, axis=1)[:, None]
            chosen = chosen | pick
            keys = tl.where(pick, _LOWEST, keys)

        chosen = chosen & routes
        counted = chosen & (column < END)[None, :]
        if NORMALIZED:
            # Where a logit is NaN all shares are, but only the selected may show it.
            gates = tl.where(counted, shares_of(log_scores(logits, SCORE), counted), 0.0)
        else:
            gates = tl.where(counted, scores, 0.0)
        tl.store(gates_ptr + at, gates * scale, exists)
        tl.store(map_ptr + at, chosen, exists)

        if partial_ptr is not None and SCORE != "softmax":
            scores = shares_of(log_scores(logits, SCORE), is_expert)
        scores = tl.where(routes, scores, 0.0)
        counts += tl.sum(tl.where(chosen, 1.0, 0.0), axis=0)
        sums += tl.sum(scores, axis=0)
    if partial_ptr is not None:
        out = (tl.program_id(0).to(tl.int64) * sequences + tl.program_id(1)) * 2 * NUM_EXPERTS
        tl.store(partial_ptr + out + column, counts, column < NUM_EXPERTS)
        tl.store(partial_ptr + out + NUM_EXPERTS + column, sums, column < NUM_EXPERTS)


@triton.jit
def _moepp_select_backward(  # type: ignore[no-untyped-def]
    logits_ptr,
    padded_ptr,
    map_ptr,
    grad_gates_ptr,
    grad_sums_ptr,
    grad_logits_ptr,
    positions,
    sequences,
    scale,
    NUM_EXPERTS: constexpr,
    SCORE: constexpr,
    NORMALIZED: constexpr,
    END: constexpr,
    BLOCK_T: constexpr,
    BLOCK_E: constexpr,
):
    at, exists, routes, column = _tile(
        padded_ptr, tl.program_id(0), positions, sequences, NUM_EXPERTS, BLOCK_T, BLOCK_E
    )
    is_expert = (column < NUM_EXPERTS)[None, :]
    logits = tl.load(logits_ptr + at, exists, 0.0)
    scores = scores_of(logits, column, NUM_EXPERTS, SCORE)
    logs = log_scores(logits, SCORE)
    # Gradient of the logarithms of the scores.
    grad = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)

    if grad_gates_ptr is not None:
        grad_gates = tl.load(grad_gates_ptr + at, exists, 0.0) * scale
        counted = (tl.load(map_ptr + at, exists, 0) != 0) & (column < END)[None, :]
        grad_gates = tl.where(counted, grad_gates, 0.0)
        if NORMALIZED:
            grad += grad_of_logs(shares_of(logs, counted), grad_gates)
        elif SCORE == "softmax":
            grad += grad_of_logs(scores, grad_gates)
        else:
            grad += scores * grad_gates

    if grad_sums_ptr is not None:
        of_sequence = grad_sums_ptr + tl.program_id(1) * NUM_EXPERTS + column
        grad_sums = tl.load(of_sequence, column < NUM_EXPERTS, 0.0)[None, :]
        grad_sums = tl.where(routes, grad_sums, 0.0)
        grad += grad_of_logs(shares_of(logs, is_expert), grad_sums)

    if SCORE != "softmax":
        grad *= slope_of_logs(logits, SCORE)
    tl.store(grad_logits_ptr + at, grad, exists)
