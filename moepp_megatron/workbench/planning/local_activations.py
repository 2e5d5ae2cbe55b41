"""Bytes that a layer of megatron-core's own modules keeps and needs on one CPU rank.

Counted tensor by tensor from megatron-core 0.19, torch 2.x and this package's modules for CPUs, as
`torch.autograd.graph.saved_tensors_hooks` shows them. Nothing is fused, so that more stays than on
a GPU: an attention core keeps its probabilities [s, s], a norm the normalised tensor before its
weight. The experts (`moe/cpu_experts.py`) keep less: the first product's result alone.

Symbols as in `parts.py`: T own tokens, S tokens of the tensor-parallel group, R rows of the
experts, D hidden size, I inner width.
"""

from __future__ import annotations

from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.parts import Layer
from moepp_megatron.workbench.planning.workload import Workload

# Temporary tensors [rows of one expert, I] at the widest place of the experts' backward pass:
# silu, its product, the gradient of the weighted product, weighted again, both halves' gradient.
_INNER_GRADIENTS = 6


def kept_bytes(load: Workload, grid: Grid, layer: Layer) -> float:
    """Bytes kept between the passes of one micro-batch and layer."""
    if grid.recomputes_all:
        return _stream(load, grid) + _checkpoint(load, grid)
    kept = 2 * _norm(load, grid) + _attention(load, grid)
    return kept + _after_attention(load, grid, layer)


def peak_bytes(load: Workload, grid: Grid, layer: Layer) -> float:
    """Bytes that the backward pass of one layer needs beside the kept ones.

    It goes through the layer from its end: when the attention's gradients are there, what the
    layer kept behind it is free.
    """
    whole = _without_recomputation(grid)
    behind = _after_attention(load, whole, layer)
    repeated = 0.0
    if grid.recomputes_all:
        repeated = kept_bytes(load, whole, layer) - _stream(load, grid)
    elif grid.recompute:
        repeated = behind - _after_attention(load, grid, layer)
    first = repeated + _gradients_after_attention(load, grid, layer)
    core = _attention(load, whole) - _attention(load, grid)
    held = repeated - behind if grid.recomputes_all else core - _after_attention(load, grid, layer)
    return max(first, held + _attention_gradients(load, grid))


def output_bytes(load: Workload, grid: Grid) -> float:
    """Final norm, logits in fp32 (and their own format), gradients of the output layer."""
    size = load.numbers.activation_bytes
    group = grid.tokens(load.seq) * grid.tp
    width = load.vocab / grid.tp
    logits = group * width * (4 + (size if size < 4 else 0))
    gradients = group * load.hidden * size + width * load.hidden * size
    # With tensor parallelism the input is gathered again for the weight's gradient.
    gathered = group * load.hidden * size if grid.tp > 1 else 0.0
    return _norm(load, grid) + logits + gradients + gathered


def resident_bytes(load: Workload, grid: Grid) -> float:
    """The buffer of scores that megatron-core's core allocates once for all layers."""
    return 0.0 if grid.cp > 1 else _scores(load, grid) * load.numbers.activation_bytes


def _without_recomputation(grid: Grid) -> Grid:
    return Grid(
        grid.world, grid.tp, grid.cp, grid.pp, grid.vpp, grid.ep, grid.etp, grid.micro_batch
    )


def _stream(load: Workload, grid: Grid) -> float:
    """A tensor [T, D]."""
    return float(grid.tokens(load.seq) * load.hidden * load.numbers.activation_bytes)


def _norm(load: Workload, grid: Grid) -> float:
    """Input and the same normalised, both in fp32, and the output."""
    if "layernorm" in grid.recompute:
        return _stream(load, grid)
    return _stream(load, grid) + 2 * 4 * grid.tokens(load.seq) * load.hidden


def _checkpoint(load: Workload, grid: Grid) -> float:
    """Inputs that a recomputed part starts from and their gradients: hidden states, fp32 logits.

    megatron-core's function holds them beyond its backward pass, until the next step has its own.
    """
    return 2 * _stream(load, grid) + 2 * 4.0 * grid.tokens(load.seq) * load.experts.num_experts


def _scores(load: Workload, grid: Grid) -> float:
    """Elements of [b, n, s, s] on one rank."""
    return grid.micro_batch * load.attention.heads / grid.tp * load.seq**2


def _attention(load: Workload, grid: Grid) -> float:
    """Queries, keys and values as the core takes them, probabilities, mask, output."""
    attention, size = load.attention, load.numbers.activation_bytes
    group = grid.tokens(load.seq) * grid.tp
    query = attention.heads // grid.tp * attention.qk_dim
    context = attention.heads // grid.tp * attention.v_dim
    projected = query + attention.exchanged_width(grid.tp)
    if grid.cp > 1:
        # Keys and values of whole sequences; the core's output in two chunks and joined.
        whole = group * grid.cp * attention.exchanged_width(grid.tp)
        return size * (group * (query + 2 * context) + whole)
    # Values are a part of the product's result and keep all of it; with fewer groups than heads
    # keys and values are repeated.
    repeated = attention.exchanged_width(grid.tp) < query + context
    values = context if repeated else projected
    core = group * (2 * query + values + context) * size
    if "core_attn" in grid.recompute:
        # The core's inputs before keys and values are repeated, and its output.
        return group * (query + attention.exchanged_width(grid.tp) / 2 + projected + context) * size
    # Probabilities in fp32, a copy in the activations' format, the mask in bytes.
    element = 4 + (size if size < 4 else 0)
    return core + _scores(load, grid) * element + load.seq**2


def _attention_gradients(load: Workload, grid: Grid) -> float:
    """Gradients of the scores, of the values, of the stream.

    In fp32 the mask is set in place on a view of the product's result, whose backward pass holds
    the gradient, its copy for the base, a copy of the slice and that masked, when the
    probabilities are free already: three more than what is kept. In bf16 the scores are a tensor
    of their own: the gradients of probabilities and scores.
    """
    size, attention = load.numbers.activation_bytes, load.attention
    group = grid.tokens(load.seq) * grid.tp
    context = group * attention.heads // grid.tp * attention.v_dim * size
    if grid.cp > 1:
        return _stream(load, grid) + 2 * context
    gradients = 3 if size == 4 else 2
    return gradients * _scores(load, grid) * 4 + 2 * context + _stream(load, grid)


def _after_attention(load: Workload, grid: Grid, layer: Layer) -> float:
    """Bytes that the FFN or the MoE layer itself keeps."""
    if not layer.is_moe:
        return _swiglu(load, grid, load.dense_size, "mlp")
    kept = _moe(load, grid, layer.rows)
    if load.experts.shared_size:
        kept += _swiglu(load, grid, load.experts.shared_size, "shared_experts")
    return kept


def _swiglu(load: Workload, grid: Grid, inner: int, module: str) -> float:
    """Result of the first product, silu of one half, the other half, their product."""
    if module in grid.recompute:
        return 0.0
    return grid.tokens(load.seq) * inner * 5 * load.numbers.activation_bytes


def _moe(load: Workload, grid: Grid, rows: float) -> float:
    """Rows that arrived, the first product's result, scores, gates and maps of the router."""
    if "moe" in grid.recompute:
        return _checkpoint(load, grid)
    own, experts = grid.tokens(load.seq), load.experts
    arrived, size = rows * grid.etp, load.numbers.activation_bytes
    # megatron-core's experts (a vanilla layer) are a chain of modules: both halves, silu of one,
    # the other, their product, the same times its gate.
    inner = (6 if experts.is_vanilla else 2) * experts.ffn_size / grid.etp
    # Scores and the logits of the layer before in fp32, chosen experts, the permutation's table.
    router = own * (
        experts.num_experts * 8.0 + experts.router_topk * 8 + experts.num_ffn_experts * 8
    )
    mixing = own * experts.num_constant_experts * 4.0 * 4
    return arrived * (load.hidden + inner) * size + router + mixing + 12.0 * arrived


def _gradients_after_attention(load: Workload, grid: Grid, layer: Layer) -> float:
    """Gradients of all weights of the experts at once, of rows, of one expert's inner tensors."""
    size, experts = load.numbers.activation_bytes, load.experts
    stream = _stream(load, grid)
    if not layer.is_moe:
        inner = 5.0 * grid.tokens(load.seq) * load.dense_size
        return 2 * stream + size * (inner + 3 * load.hidden * load.dense_size / grid.tp)
    local, width = experts.num_ffn_experts // grid.ep, experts.ffn_size / grid.etp
    arrived = layer.rows * grid.etp
    # All experts' gradients leave one function; megatron-core's experts add up one at a time.
    weights = (1 if experts.is_vanilla else local) * 3 * load.hidden * width
    inner = _INNER_GRADIENTS * arrived / local * width
    return 2 * stream + size * (weights + 2 * arrived * load.hidden + inner)
