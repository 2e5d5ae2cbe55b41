"""FLOP and memory traffic of every part of a layer, per rank and micro-batch.

Symbols: T tokens that a rank routes, S tokens of its tensor-parallel group (S = T tp), R rows that
a rank's experts compute (R = T K phi when load is even), D hidden size, I expert width, E all
experts. Bytes are of kernels without products; each tensor counts once a read and once a write.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.rates import Work, linear_products, linear_work
from moepp_megatron.tools.planning.traffic import distinct_targets, rows_with_room
from moepp_megatron.tools.planning.workload import Workload

# Dispatchers whose rows travel during computation.
TRAVELLING = ("alltoall", "alltoall_dedup")
# Kernels of the attention forward besides its projections: rotations, layouts, core.
_CORE_KERNELS = 10
# Kernels of the router beside its products, forward and backward: megatron-core's operations one by
# one, and with `moe.fused` (tests/fake_gpu counts both).
_ROUTER_KERNELS, _FUSED_ROUTER_KERNELS = (10, 8), (1, 7)
# Reads and writes, forward and backward, of a tensor [rows, I] between an FFN's two products.
_ACTIVATION_PASSES = (3, 6)
# The same in PyTorch's operations (`moe/local_experts.py`), and kernels with the products; passes
# over a tensor [rows, D] times its gates, and over the weights, which are copied side by side.
_GROUPED_PASSES, _GROUPED_KERNELS, _GATED_PASSES, _WEIGHT_PASSES = (5, 20), (9, 17), 2, 2
# Of the permutation of static rows, either way (tests/fake_gpu counts all three).
_STATIC_KERNELS = 24
# Of clamping both halves of the first product, two clamps that are joined again: the same passes,
# and kernels (megatron-core, fusions/fused_bias_geglu.py).
_CLAMP_PASSES, _CLAMP_KERNELS = (8, 10), 3
# Of the second product's bias, which is added to each expert's rows apart: a product with the gates
# and a sum, all joined; backward two products and their sums. Passes over [rows, D], and kernels of
# each expert (megatron-core, `TEGroupedMLP._apply_bias`). The first product adds its own.
_BIAS_PASSES, _BIAS_KERNELS = (6, 8), (2, 4)
# Of a rotation without a kernel of its own: products with cosine and sine, halves swapped, joined
# and added, either way: passes over queries and keys (megatron-core, rope_utils.py).
_ROTATION_PASSES, _ROTATION_KERNELS = 12, 24


@dataclass(frozen=True, slots=True)
class LayerPart:
    """One part of a layer."""

    name: str  # its name in tables and plots
    forward: Work  # work of the forward pass
    backward: Work  # work of the backward pass, recomputation not included
    again: Work = Work()  # work of the forward pass that the backward pass repeats


@dataclass(frozen=True, slots=True)
class Layer:
    """Differences between layers in cost."""

    is_moe: bool  # whether it holds experts
    rows: float = 0.0  # rows R that the slowest rank's experts compute
    has_residual: bool = False  # whether its router sees the logits of the MoE layer before


def layer_parts(load: Workload, grid: Grid, layer: Layer) -> Iterator[LayerPart]:
    """The parts of one layer."""
    yield _attention(load, grid)
    yield _norms(load, grid)
    if not layer.is_moe:
        yield _swiglu(load, grid, "dense_ffn", load.dense_size, "mlp")
        return
    yield _router(load, grid, layer.has_residual)
    yield _permutation(load, grid, layer.rows)
    yield _experts(load, grid, layer.rows)
    if load.experts.num_zero_computation_experts:
        yield _zero_computation(load, grid)
    if load.experts.shared_size:
        yield _swiglu(load, grid, "shared_expert", load.experts.shared_size, "shared_experts")


def _again(grid: Grid, module: str, work: Work) -> Work:
    """The work if the backward pass repeats this module."""
    return work if grid.recomputes_all or module in grid.recompute else Work()


def _attention(load: Workload, grid: Grid) -> LayerPart:
    """Projections, rotation, and the core with its scores [s, s]."""
    attention, number = load.attention, load.numbers.dtype
    tokens = grid.tokens(load.seq)
    group = tokens * grid.tp
    heads = attention.heads // grid.tp
    core = 2.0 * load.seq * load.causal_share * group * heads * (attention.qk_dim + attention.v_dim)
    size, seq = load.numbers.activation_bytes, load.seq // grid.cp
    # The rotation reads and writes queries and keys; query/key norms do so again.
    turned = 2 * size * group * heads * 2 * attention.qk_dim
    moved, kernels = turned * (2.0 if attention.norm_parameters() else 1.0), _CORE_KERNELS
    if not load.rotation_fused:
        width = heads * attention.qk_dim + attention.exchanged_width(grid.tp) / 2
        moved += _ROTATION_PASSES * size * group * width - turned
        kernels += _ROTATION_KERNELS
    matmuls = attention.matmuls(load.hidden, grid.tp)
    works = [
        linear_work(load, tokens if m.is_sequence_parallel else group, m.outputs, m.inputs)
        for m in matmuls
    ]
    ahead = Work((), core, seq, core_number=number)
    ahead = ahead.plus(
        *(forward for forward, _ in works), moved=moved, kernels=kernels + len(works)
    )
    # Backward the core computes scores again: five products where the forward pass has two.
    back = Work((), 2.5 * core, seq, is_backward=True, core_number=number)
    back = back.plus(*(backward for _, backward in works), moved=moved)
    back = replace(back, kernels=ahead.kernels * 3 // 2)
    again = ahead if grid.recomputes_all else Work()
    if "core_attn" in grid.recompute:
        again = Work((), core, seq, 0.0, 1, core_number=number)
    if "mla_up_proj" in grid.recompute:
        expanding = zip(matmuls, works, strict=True)
        up = [Work(work.products) for matmul, (work, _) in expanding if matmul.is_up_projection]
        again = again.plus(*up, kernels=4)
    return LayerPart("attention", ahead, back, again)


def _norms(load: Workload, grid: Grid) -> LayerPart:
    """Two RMSNorms and two additions to the residual stream."""
    tensor = grid.tokens(load.seq) * load.row_bytes
    forward = Work(moved=10 * tensor, kernels=4)
    backward = Work(moved=10 * tensor, kernels=6)
    again = Work(moved=4 * tensor, kernels=2)
    return LayerPart("norms", forward, backward, _again(grid, "layernorm", again))


def _swiglu(load: Workload, grid: Grid, name: str, inner: int, module: str) -> LayerPart:
    """An FFN of three matrices [D, inner] that all tokens take, split over tensor ranks."""
    rows = grid.tokens(load.seq) * grid.tp
    width = inner / grid.tp
    halves = 1 if name == "dense_ffn" and not load.gated else 2
    first = linear_work(load, rows, halves * width, load.hidden)
    second = linear_work(load, rows, load.hidden, width)
    activation = load.numbers.activation_bytes * rows * width
    passes = [count * activation for count in _ACTIVATION_PASSES]
    forward = first[0].plus(second[0], moved=passes[0], kernels=4)
    backward = first[1].plus(second[1], moved=passes[1], kernels=7)
    return LayerPart(name, forward, backward, _again(grid, module, forward))


def _router(load: Workload, grid: Grid, has_residual: bool) -> LayerPart:
    """Logits z = W x (+ G z') and U x, scores, the choice of K experts, the balance loss."""
    experts = load.experts
    tokens, wide = grid.tokens(load.seq), experts.num_experts
    (width, depth), *others = experts.router_shapes(load.hidden, is_first=not has_residual)
    # The gate's first product and the constant experts' are one.
    shapes = [(width + _mixing_logits(load), depth), *others]
    forward, backward = linear_products(tokens, shapes, load.numbers.dtype)
    # fp32 logits, scores, map and probabilities: about eight passes over [T, E].
    moved = 8.0 * 4 * tokens * wide
    few = load.local_fused and not experts.is_vanilla
    kernels = _FUSED_ROUTER_KERNELS if few else _ROUTER_KERNELS
    ahead = Work(forward, moved=moved, kernels=kernels[0] + 2 * len(shapes))
    back = Work(backward, moved=moved, kernels=kernels[1] + 2 * len(shapes))
    return LayerPart("router", ahead, back, _again(grid, "moe", ahead))


def _permutation(load: Workload, grid: Grid, rows: float) -> LayerPart:
    """Tokens are copied into the order of their experts and summed back, on both sides."""
    tokens = grid.tokens(load.seq)
    arrived = rows * grid.etp
    taken, experts = load.experts.ffn_per_token, load.experts.num_ffn_experts
    passes, kernels = 2.0, 8
    if not load.experts.permute_fused:
        # Sorting of the map, gathers and scatter-adds with their zeroed targets, one by one.
        passes, kernels = 4.0, 24
    match load.experts.dispatcher if grid.ep > 1 else None:
        case _ if load.experts.static_rows is not None:
            # `moe/static_dispatcher.py`, in PyTorch's operations over all rows of a buffer: a
            # gather reads and writes them; a sum reads them, and adds to what it reads and writes.
            # Between ranks rows are sorted by expert once more, and back.
            moved = tokens + (9 if grid.ep > 1 else 3) * rows_with_room(load, grid, rows)
            passes, kernels = 1.0, _STATIC_KERNELS
        case None:
            moved = tokens + arrived
        case "alltoall":
            # Sorted by expert at the sender, and again where several experts share a rank.
            moved = tokens + rows + (2 * arrived if experts > grid.ep else 0.0)
        case "allgather":
            moved = tokens * grid.ep + arrived
        case "alltoall_dedup" | "flex":
            moved = tokens + 2 * tokens * distinct_targets(grid.ep, taken, experts) + arrived
        case other:
            assert_never(other)
    work = Work(moved=passes * load.row_bytes * moved, kernels=kernels)
    return LayerPart("permutation", work, work, _again(grid, "moe", work))


def _experts(load: Workload, grid: Grid, rows: float) -> LayerPart:
    """The FFN experts of a rank."""
    # A product for each expert and matrix (Transformer Engine's cublaslt_gemm.cu); backward two.
    experts = load.experts.num_ffn_experts // grid.ep
    width = load.experts.ffn_size / grid.etp
    copied, copies = _row_copies(load, rows * grid.etp)
    # Of what is added to each expert's rows, half an alignment is the mean.
    rows = rows * grid.etp + experts * (load.numbers.row_alignment - 1) / 2
    first = linear_work(load, rows / experts, 2 * width, load.hidden, experts)
    second = linear_work(load, rows / experts, load.hidden, width, experts)
    activation = load.numbers.activation_bytes * rows * width
    if load.experts.static_rows is None:
        moved, kernels = _around_products(load, activation, rows, experts)
    else:
        moved, kernels = _around_grouped(load, rows_with_room(load, grid, rows), experts)
    forward, backward = (
        part.plus(other, moved=moved_bytes + copied, kernels=count + copies)
        for part, other, moved_bytes, count in zip(first, second, moved, kernels, strict=True)
    )
    again = _again(grid, "moe", forward)
    if "moe_act" in grid.recompute:
        clamped = load.experts.is_clamped
        passes = _ACTIVATION_PASSES[0] + clamped * _CLAMP_PASSES[0]
        again = Work(moved=passes * activation, kernels=1 + clamped * _CLAMP_KERNELS)
    return LayerPart("experts", forward, backward, again)


def _around_products(
    load: Workload, activation: float, rows: float, experts: int
) -> tuple[list[float], list[int]]:
    """Bytes besides the experts' products, and kernels with them, forward and backward."""
    clamped, biased = load.experts.is_clamped, load.experts.has_bias
    output = load.row_bytes * rows
    moved = [
        (passes + clamped * clamp) * activation + biased * bias * output
        for passes, clamp, bias in zip(_ACTIVATION_PASSES, _CLAMP_PASSES, _BIAS_PASSES, strict=True)
    ]
    kernels = [
        base + (per_expert + biased * bias) * experts + clamped * _CLAMP_KERNELS
        for base, per_expert, bias in zip((4, 6), (2, 4), _BIAS_KERNELS, strict=True)
    ]
    return moved, kernels


def _around_grouped(load: Workload, rows: float, experts: int) -> tuple[list[float], list[int]]:
    """The same of `GroupedExperts`, with one product for all experts, over all rows of a buffer."""
    size, hidden, width = load.numbers.activation_bytes, load.hidden, load.experts.ffn_size
    weights = 3 * hidden * width * experts
    others = size * (_GATED_PASSES * rows * hidden + _WEIGHT_PASSES * weights)
    moved = [passes * size * rows * width + others for passes in _GROUPED_PASSES]
    # The gradient of each of an expert's two weights is added to the sum over micro-batches.
    moved[1] += weights * (size + 2 * load.numbers.gradient_bytes)
    return moved, [_GROUPED_KERNELS[0], _GROUPED_KERNELS[1] + 2 * experts]


def _row_copies(load: Workload, rows: float) -> tuple[float, int]:
    """Bytes and kernels, of either pass, that round each expert's rows for FP8 products."""
    # The router or a flex dispatcher may have rounded them. Otherwise input, gates and output are
    # copied one by one (Transformer Engine's `Fp8Padding` and `Fp8Unpadding`).
    experts = load.experts
    is_padded = experts.router_pads or (experts.flex_pads and experts.dispatcher == "flex")
    if load.numbers.fp8 is None or is_padded:
        return 0.0, 0
    # Two copies of [rows, D], each read and written; gates are fp32.
    return rows * (4.0 * load.row_bytes + 2.0 * 4), 3


def _local_form(load: Workload, grid: Grid) -> Literal["combined", "apart", "plain"]:
    """The form in which zero-computation experts are computed; plain is in PyTorch's operations."""
    # Combined: in the kernel that returns FFN experts' rows to their tokens, where nothing travels.
    # Apart: in one kernel (`moe.kernels.combine.add_local`).
    if not load.local_fused:
        return "plain"
    return "combined" if grid.ep == 1 and load.experts.dispatcher in TRAVELLING else "apart"


def _mixing_logits(load: Workload) -> int:
    """Outputs of the constant experts' own gate, `U x`: the router's product computes them too."""
    return sum(n for n, k in load.experts.local_matmuls(load.hidden) if k == load.hidden)


def _zero_computation(load: Workload, grid: Grid) -> LayerPart:
    """`y = s x + A V` without `U x`: no token is gathered, sorted or sent."""
    tokens = grid.tokens(load.seq)
    tensor = tokens * load.row_bytes
    matmuls = [(n, k) for n, k in load.experts.local_matmuls(load.hidden) if k != load.hidden]
    ahead, back = linear_products(tokens, matmuls, load.numbers.dtype)
    form = _local_form(load, grid)
    if form == "plain":
        forward = Work(ahead, moved=3.0 * tensor, kernels=5)
        backward = Work(back, moved=6.0 * tensor, kernels=8)
    else:
        # Tensors [T, D] of the kernel, those of its products too: x; apart also the output, which
        # is read again. Backward x and its gradient, apart also the output's gradient. Apart,
        # gradients of hidden states and gates meet those of the rows in sums of their own.
        tensors, kernels = {"combined": ((1.0, 2.0), (0, 0)), "apart": ((3.0, 3.0), (1, 4))}[form]
        moved = [
            max(count * tensor - sum(product.moved for product in products), 0.0)
            for count, products in zip(tensors, (ahead, back), strict=True)
        ]
        # Gradients of the gates, then of V: parts added up, rounded.
        after = 1 + (2 if matmuls else 0)
        forward = Work(ahead, moved=moved[0], kernels=kernels[0])
        backward = Work(back, moved=moved[1], kernels=kernels[1] + after)
    return LayerPart("zero_computation", forward, backward, _again(grid, "moe", forward))


def embedding_part(load: Workload, grid: Grid) -> LayerPart:
    """Work of the embedding: rows of the table are read; backward, gradients are added to it."""
    tensor = grid.tokens(load.seq) * grid.tp * load.row_bytes
    backward = Work(moved=3.0 * tensor, kernels=3)
    return LayerPart("output", Work(moved=2.0 * tensor, kernels=3), backward)


def output_part(load: Workload, grid: Grid) -> LayerPart:
    """Work of the output layer [V, D] in bf16 and the cross entropy of its logits."""
    rows = grid.tokens(load.seq) * grid.tp
    width = load.vocab / grid.tp
    forward, backward = linear_products(rows, [(width, load.hidden)], load.numbers.dtype)
    logits, size = rows * width, load.numbers.activation_bytes
    # Logits to fp32, their maximum, exponentials and sum; backward one pass. Fused: read once,
    # backward read and written (`moe/kernels/cross_entropy.py`).
    moved, kernels = ((1.0 * size, 2.0 * size), 3) if load.loss_fused else ((20.0, 10.0), 6)
    ahead = Work(forward, moved=moved[0] * logits, kernels=10)
    back = Work(backward, moved=moved[1] * logits, kernels=kernels)
    return LayerPart("output", ahead, back)
