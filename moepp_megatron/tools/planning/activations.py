"""Bytes that one rank's layer keeps of a micro-batch for the backward pass.

Counted tensor by tensor from megatron-core 0.19: with sequence parallelism the norms, the residual
stream and the router hold the rank's own tokens T, attention the T tp tokens of its group, experts
the R rows that arrived. Gates are applied inside the experts' activation, so that their outputs are
not kept (arXiv 2603.07685, section 4.1.2).
"""

from dataclasses import replace

from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.parts import Layer
from moepp_megatron.tools.planning.traffic import distinct_targets, rows_with_room
from moepp_megatron.tools.planning.workload import LatentAttention, Workload

# GPUs of a node.
_JOINED_RANKS = 8


def kept_bytes(load: Workload, grid: Grid, layer: Layer) -> float:
    """Bytes kept between the passes of one micro-batch and layer."""
    tokens = grid.tokens(load.seq)
    stream = float(tokens * load.row_bytes)
    if grid.recomputes_all:
        # What the layer starts from: hidden states, and the logits of the MoE layer before.
        passed_on = load.experts.num_experts if load.experts.gating_residual else 0
        return stream + 4.0 * tokens * passed_on
    kept = stream * 2 + _norm_outputs(load, grid, layer.is_moe) + _attention(load, grid)
    if not layer.is_moe:
        return kept + _swiglu(load, grid, load.dense_size, "mlp")
    kept += _moe(load, grid, layer.rows) + _between_nodes(load, grid)
    if load.experts.shared_size:
        kept += _swiglu(load, grid, load.experts.shared_size, "shared_experts")
    return kept


def peak_bytes(load: Workload, grid: Grid, layer: Layer) -> float:
    """Bytes that the pass of one layer needs besides the kept ones: buffers, gradients."""
    tokens, row = grid.tokens(load.seq), load.row_bytes
    peak = 3.0 * tokens * row
    if layer.is_moe:
        # Sent and received rows, and gradients of the experts' two inner tensors.
        sent = rows_with_room(load, grid, tokens * load.experts.ffn_per_token) * row
        if load.experts.dispatcher in ("alltoall_dedup", "flex"):
            taken, experts = load.experts.ffn_per_token, load.experts.num_ffn_experts
            sent = tokens * distinct_targets(grid.ep, taken, experts) * row
        inner = layer.rows * load.experts.ffn_size * load.numbers.activation_bytes
        # PyTorch's operations have twice as many (`moe/local_experts.py`).
        inner *= 3 if load.experts.static_rows is None else 6
        arrived = layer.rows * grid.etp * row
        peak += sent + arrived + inner
        if load.delays_gradients and grid.expert_overlap:
            # Gradients of the experts' outputs wait with those of their inputs.
            peak += arrived
    if grid.recompute:
        stored = replace(grid, recompute=(), recomputed_layers=None)
        peak += kept_bytes(load, stored, layer) - kept_bytes(load, grid, layer)
    return peak


def output_bytes(load: Workload, grid: Grid) -> float:
    """Bytes that the output layer and its loss need at the start of the backward pass.

    Logits of one micro-batch, in fp32 too unless their cross entropy is fused: megatron-core makes
    probabilities and their gradient of the fp32 logits in place; the other format holds logits,
    then their gradient. Beside them the final norm's output, its gradient and that of the weights.
    """
    size = load.numbers.activation_bytes
    tokens = grid.tokens(load.seq)
    width = load.vocab / grid.tp
    logits = tokens * grid.tp * width * (size + (0 if load.loss_fused else 4))
    return logits + (tokens + tokens * grid.tp + width) * load.hidden * size


def resident_bytes(load: Workload, grid: Grid) -> float:
    """Bytes that the modules allocate once and never free."""
    if load.experts.dispatcher != "flex" or not any(load.is_moe):
        return 0.0
    # DeepEP and HybridEP receive into buffers for the worst case, one for each direction: all
    # tokens of the ranks that NVLink joins (deepseek-ai/DeepEP, csrc/hybrid_ep).
    tokens = grid.tokens(load.seq) * min(grid.ep, _JOINED_RANKS)
    return 2.0 * tokens * load.row_bytes


def _input_size(load: Workload) -> float:
    """Bytes of an element of a product's kept input."""
    return 1.0 if load.numbers.fp8 else float(load.numbers.activation_bytes)


def _norm_outputs(load: Workload, grid: Grid, is_moe: bool) -> float:
    """Outputs of the two norms: input of the projections, input of the FFN or router."""
    # Transformer Engine has a norm inside the product that follows it, and megatron-core repeats
    # only those that are modules of their own: before latent attention, before an MoE layer.
    elements = grid.tokens(load.seq) * load.hidden
    repeats = "layernorm" in grid.recompute
    is_latent = isinstance(load.attention, LatentAttention)
    before_attention = 0.0 if repeats and is_latent else elements * _input_size(load)
    before_ffn = 0.0 if repeats and is_moe else float(elements * load.numbers.activation_bytes)
    return before_attention + before_ffn


def _attention(load: Workload, grid: Grid) -> float:
    """Queries, keys, values, output, and the scores' row sums in fp32."""
    group = grid.tokens(load.seq) * grid.tp
    size = load.numbers.activation_bytes
    kept = group * load.attention.kept_width(grid.tp) * size
    output = group * load.attention.heads // grid.tp * load.attention.v_dim * size
    if "core_attn" in grid.recompute:
        # Only queries, keys and values stay.
        kept -= output
    if "mla_up_proj" in grid.recompute:
        # Compressed vectors stay instead, and the output.
        kept = output + group * load.attention.gathered_width(load.hidden) * size
    return kept + 4.0 * group * load.attention.heads / grid.tp


def _swiglu(load: Workload, grid: Grid, inner: int, module: str) -> float:
    """Both halves of the first product, and the second one's input."""
    if module in grid.recompute:
        return 0.0
    group = grid.tokens(load.seq) * grid.tp
    width = inner / grid.tp
    return group * width * (2 * load.numbers.activation_bytes + _input_size(load))


def _between_nodes(load: Workload, grid: Grid) -> float:
    """Bytes between nodes of an MoE++ layer's combined schedule (`moe/overlap.py`)."""
    # A node's results stay until its backward pass: the local experts' output, and the hidden
    # states packed with the lane, whose two parts the next layer copies.
    if not grid.expert_overlap or load.experts.is_vanilla:
        return 0.0
    tokens, size = grid.tokens(load.seq), load.numbers.activation_bytes
    lane = 4 * load.experts.num_experts if load.experts.gating_residual else 0
    packed = load.hidden * size + 2 * lane if lane else 0
    return float(tokens * (load.hidden * size + packed))


def _moe(load: Workload, grid: Grid, rows: float) -> float:
    """Router's fp32 tensors, arrived rows, both halves of the first product, the second's input."""
    if "moe" in grid.recompute:
        return 0.0
    tokens = grid.tokens(load.seq)
    size, kept_size = load.numbers.activation_bytes, _input_size(load)
    # Logits, scores and gates in fp32, the map in bytes; the residual's logits are passed on.
    router = tokens * load.experts.num_experts * (3 * 4 + 1.0)
    arrived = rows * grid.etp
    width = load.experts.ffn_size / grid.etp
    first_input = arrived * load.hidden * kept_size
    repeats = "moe_act" in grid.recompute or load.experts.static_rows is not None
    activation = 0.0 if repeats else arrived * width * kept_size
    # Between the products of the zero-computation experts, in fp32.
    matmuls = load.experts.local_matmuls(load.hidden)
    between = sum(n if k == load.hidden else k for n, k in matmuls)
    zero_computation = tokens * between * 4.0
    return router + first_input + 2 * arrived * width * size + activation + zero_computation
