"""One kernel that returns FFN experts' rows to their tokens and adds all other experts' outputs.

    y_t = sum of the token's rows + s_t x_t + A_t V + addend_t

The definition is the code that runs without kernels: the dispatcher's unpermutation, then
`ZeroComputationExperts.forward`, then an addition; 5 to 7 passes over [T, D] and a dozen launches
for s and A, against one read of each operand and one write here, summed in fp32 and rounded once. x
is read only for tokens that selected a copy or constant expert.

Where nothing travels (one expert-parallel rank), one kernel does it all. Where outputs travel,
`add_local` does zero-computation and shared experts in the meantime, and this kernel adds their sum
as its addend; in the backward pass the rows' gradients leave first, and x and V are read while they
travel. A row takes seven times as long over NVLink (450 GB/s) as through memory (3.35 TB/s), so
that pays. Autograd runs nodes in the reverse order of their creation, hence `add_local` before the
wait. A dispatcher that adds up FFN experts' outputs by itself (all-gather, flex) hands over
finished tokens, which are the addend of `add_local`. In the combined schedule `add_local` runs
before the dispatch.

Bytes per token: forward reads the rows, x where it is used, addend, gates, map and mixing logits
and writes D elements. Backward reads D and x, writes the rows and D, and besides writes and reads
4 (1 + C) bytes for each 256 columns, and 4 C D / chunk (`_chunk`).
Shape suffixes: T tokens, R rows, D hidden size, C constant experts.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from moepp_megatron.experts import CONSTANT
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.kernels import combine_triton as kernel
from moepp_megatron.moe.kernels import interprets
from moepp_megatron.moe.zero_computation import Ingredients

# A program's tile: 256 columns of 16 tokens, so every row is read in pieces of 512 bytes (bf16),
# and matrix units multiply as many rows at once. 16 elements a thread leave registers for many
# loads in flight.
_BLOCK_T, _BLOCK_D, _WARPS = 16, 256, 8
# The least side of a matrix that these units multiply, to which constant experts are padded.
_LEAST = 16
# Columns of V beside which tiles of that width fit: a program holds V's part of them in the shared
# memory of its processor, of which an H100 gives it 227 KiB.
_MOST = 64
# Programs of a backward pass to aim at: two for each of an H100's 132 processors. Registers hold
# both at once with few constants; Triton 3.6 gives those of 30 so many that one runs after the
# other. Not taken from the device, so that the order of additions, and with it the last
# bit, depends only on shapes.
_PROGRAMS = 256
# Elements [tokens, experts] of a program that turns weights' gradients into those of gates and
# mixing logits, eight a thread.
_TILE_OF_WEIGHTS = 1024


def combine(
    rows: Tensor,
    table: Tensor,
    zero: Ingredients | None,
    addend: Tensor | None,
    config: MoEPPConfig,
) -> Tensor:
    """[T, D] sum of what a token's experts return, dtype of `rows`.

    Differentiable in rows, x, gates, mixing logits, V and addend.

    Args:
        rows: [R, D] FFN experts' outputs, times their gates.
        table: [T, slots] int32, which rows are each token's, -1 for none; every row is of exactly
            one token (`copies.rows_of_tokens`).
        zero: Inputs of zero-computation experts; None if they return 0. A token's gates of experts
            that it did not select must be 0; their gradient is meaningless.
        addend: [T, D] shared experts' output; None for none.
    """
    parts = (None,) * 5 if zero is None else tuple(zero)
    return _Combine.apply(rows, table, *parts, addend, config)


def add_local(zero: Ingredients, addend: Tensor | None, config: MoEPPConfig) -> Tensor:
    """[T, D] what the experts of a token's own rank add to it: `combine` without rows."""
    tokens, hidden = zero.x.shape
    table = torch.empty(tokens, 0, dtype=torch.int32, device=zero.x.device)
    return combine(zero.x.new_empty(0, hidden), table, zero, addend, config)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        table: Tensor,
        x: Tensor | None,
        gates: Tensor | None,
        routing_map: Tensor | None,
        mixing: Tensor | None,
        V: Tensor | None,
        addend: Tensor | None,
        config: MoEPPConfig,
    ) -> Tensor:
        rows = rows.contiguous()
        x, gates, routing_map, mixing, V, addend = map(
            _contiguous, (x, gates, routing_map, mixing, V, addend)
        )
        num_tokens, hidden = table.shape[0], rows.shape[1]
        output = rows.new_empty(num_tokens, hidden)
        columns = _columns(config, x)
        # As many tokens as columns of V: what is read of V is then no more than a row a token.
        chunk = columns["BLOCK_C"]
        tile = _tile(hidden, columns["BLOCK_C"])
        programs = triton.cdiv(num_tokens, chunk) * triton.cdiv(hidden, tile["BLOCK_D"])
        if programs:
            kernel.moepp_combine_forward[(programs,)](
                rows,
                table,
                x,
                gates,
                routing_map,
                mixing,
                V,
                addend,
                output,
                num_tokens,
                config.expert_input_scale,
                SLOTS=table.shape[1],
                CHUNK=chunk,
                num_stages=_stages(columns["BLOCK_C"], is_backward=False),
                **tile,
                **columns,
            )
        ctx.save_for_backward(table, x, gates, routing_map, mixing, V)
        ctx.num_rows, ctx.config = rows.shape[0], config
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, x, gates, routing_map, mixing, V = ctx.saved_tensors
        grad = grad.contiguous()
        num_tokens, hidden = table.shape[0], grad.shape[1]
        columns = _columns(ctx.config, x)
        constants = columns["CONSTANTS"]
        tile = _tile(hidden, columns["BLOCK_C"])
        parts = triton.cdiv(hidden, tile["BLOCK_D"])
        chunk = _chunk(num_tokens, parts, columns["BLOCK_C"])
        chunks = triton.cdiv(num_tokens, chunk)

        grad_rows = grad.new_empty(ctx.num_rows, hidden)
        grad_x = weights = vectors = None
        if x is not None:
            grad_x = torch.empty_like(x)
            # Sums over D and over T, each program's by itself: added up in one order on every run.
            weights = gates.new_empty(parts, num_tokens, 1 + constants)
        if V is not None:
            vectors = gates.new_empty(chunks, constants, hidden)
        if chunks:
            kernel.moepp_combine_backward[(chunks * parts,)](
                grad,
                table,
                x,
                gates,
                routing_map,
                mixing,
                V,
                grad_rows,
                grad_x,
                weights,
                vectors,
                num_tokens,
                ctx.config.expert_input_scale,
                SLOTS=table.shape[1],
                CHUNK=chunk,
                num_stages=_stages(columns["BLOCK_C"], is_backward=True),
                **tile,
                **columns,
            )
        grad_gates, grad_mixing = _backward_of_weights(weights, gates, mixing, ctx.config)
        return (
            grad_rows,
            None,
            grad_x,
            grad_gates,
            None,
            grad_mixing,
            None if vectors is None else vectors.sum(dim=0).to(V.dtype),
            grad if ctx.needs_input_grad[7] else None,
            None,
        )


def _backward_of_weights(
    weights: Tensor | None, gates: Tensor | None, mixing: Tensor | None, config: MoEPPConfig
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gates and mixing logits, from parts [parts, T, 1 + C] of those of s and A."""
    if weights is None or gates is None:
        return None, None
    parts, num_tokens, _ = weights.shape
    grad_gates = torch.empty_like(gates)
    grad_mixing = None if mixing is None else torch.empty_like(mixing)
    if num_tokens:
        columns = _columns(config, gates)
        block = max(1, _TILE_OF_WEIGHTS // columns["BLOCK_C"])
        kernel.moepp_combine_backward_of_weights[(triton.cdiv(num_tokens, block),)](
            weights,
            gates,
            mixing,
            grad_gates,
            grad_mixing,
            num_tokens,
            config.expert_input_scale,
            PARTS=parts,
            BLOCK_T=block,
            **columns,
        )
    return grad_gates, grad_mixing


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _tile(hidden: int, block_c: int) -> dict[str, Any]:
    return {
        "HIDDEN": hidden,
        "BLOCK_T": _BLOCK_T,
        "BLOCK_D": _BLOCK_D if block_c <= _MOST else max(_LEAST, _BLOCK_D * _MOST // block_c),
        "WIDEN": interprets(),
        "num_warps": _WARPS,
    }


def _columns(config: MoEPPConfig, given: Tensor | None) -> dict[str, int]:
    """Columns of constant, then copy experts among all; 0 if not given."""
    constants, copies = 0, 0
    if given is not None:
        constants, copies = config.num_constant_experts, config.num_copy_experts
    return {
        "NUM_EXPERTS": config.num_experts,
        "FIRST": config.columns(CONSTANT).start,
        "CONSTANTS": constants,
        "COPIES": copies,
        "BLOCK_C": max(_LEAST, triton.next_power_of_2(constants + copies)),
    }


def _chunk(num_tokens: int, parts: int, block_c: int) -> int:
    """Tokens, a power of two, that a program of the backward pass adds up for V's gradient."""
    chunk, longest = 2 * _BLOCK_T, max(128, 8 * block_c)
    while chunk < longest and num_tokens * parts >= 2 * chunk * _PROGRAMS:
        chunk *= 2
    return chunk


def _stages(block_c: int, is_backward: bool) -> int:
    """Tiles that a program has under way, by the registers and shared memory that they take."""
    return 1 if block_c > 128 or (is_backward and block_c <= 32) else 3
