"""The least time that each part of a layer's forward pass can take on a measured GPU.

A part must move its operands through memory once and do its multiplications; the longer of the two
is its bound, with the GPU's own measured copy and matrix product as rates: its clocks under load
and its libraries decide, and no layer can be faster than its product. Memory traffic counts what no
cache can save: each operand once, and tokens that the routing leaves out not at all. There is one
rank, so nothing crosses a network.

    part              bytes                                             FLOPs
    router            x, weights, logits before; logits, gates, map     2 T E (D + E)
    dispatch          map; x of FFN-routed tokens; R rows and gates
    experts           weights; R rows in and out                        6 R D H
    zero_computation  x of tokens with a copy or constant expert; out
    combine           R rows; out

T tokens, D hidden size, H width of an expert, E experts, R rows: selections of FFN experts. Where
one kernel combines and adds up zero-computation experts (`moe/kernels`), `combine` is that kernel
and `zero_computation` the product of the mixing weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp_megatron.experts import FFN, ZERO
from moepp_megatron.tools.bench import clock
from moepp_megatron.tools.bench.shapes import PaperShape

_FP32, _BOOL = 4, 1
# As large as the products of a layer get, and enough to fill any GPU (1.1 TFLOP).
_GPU_SIZE, _CPU_SIZE = 8192, 1024
# Far more than any cache holds.
_GPU_BYTES, _CPU_BYTES = 2**30, 2**28
_GPU_REPEATS, _CPU_REPEATS = 30, 5
# Transformer Engine's quantization.py, `_compute_fp8_support`.
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class CardResult:
    """Rates measured on one GPU, or on "cpu": median TFLOP/s by number format, and GB/s of a copy.

    `copy_gb_s` counts bytes read and bytes written. Formats that the GPU cannot do are left out.
    """

    device: str
    matmul_tflops: dict[str, float]
    copy_gb_s: float


def measure_card(
    dtypes: Sequence[str], size: int | None = None, num_bytes: int | None = None
) -> CardResult:
    """Measure the current device; those of `dtypes` (fp32, bf16, fp8) that it lacks are left out.

    `size` is the side of the square matrices, `num_bytes` what is copied; None fits the device.
    """
    device = _device()
    on_gpu = device.type == "cuda"
    size = size or (_GPU_SIZE if on_gpu else _CPU_SIZE)
    fit = [dtype for dtype in dtypes if _card_obstacle(dtype) is None]
    return CardResult(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        matmul_tflops={
            dtype: 2.0 * size**3 / _median_seconds(_matmul(dtype, size)) / 1e12 for dtype in fit
        },
        copy_gb_s=_copy_gb_s(num_bytes or (_GPU_BYTES if on_gpu else _CPU_BYTES)),
    )


def _card_obstacle(dtype: str) -> str | None:
    """Why this GPU has no fast product of a number format; None where it has."""
    if dtype != "fp8":
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    needs = f"needs compute capability 8.9, not {'.'.join(map(str, capability))}"
    return needs if capability < _FP8_CAPABILITY else None


def _matmul(dtype: str, size: int) -> Callable[[], Tensor]:
    """A square product to be timed: fp8 with a scale a tensor, fp32 without TF32."""
    device = _device()
    # Ordinary numbers: the power that a product draws, and so its speed, depends on its bits.
    left, right = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == "fp8":
        from torch.nn.functional import ScalingType, scaled_mm

        one = torch.ones((), device=device)
        rows, columns = (m.to(torch.float8_e4m3fn) for m in (left, right))
        # The right matrix column by column, the one layout that Hopper's FP8 product takes.
        return lambda: scaled_mm(
            rows,
            columns.t(),
            one,
            ScalingType.TensorWise,
            one,
            ScalingType.TensorWise,
            output_dtype=torch.bfloat16,
            use_fast_accum=device.type == "cuda",
        )
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    left, right = left.to(number), right.to(number)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _copy_gb_s(num_bytes: int) -> float:
    """GB/s of a copy within the GPU's memory: bytes read plus bytes written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=_device())
    target = torch.empty_like(source)
    return 2 * num_bytes / _median_seconds(lambda: target.copy_(source)) / 1e9


def _median_seconds(work: Callable[[], object]) -> float:
    """Median time of the work, back to back, after as many repetitions that do not count."""
    # On a GPU the first half brings up the clocks, as a training step does.
    repeats = _GPU_REPEATS if torch.cuda.is_available() else _CPU_REPEATS
    for _ in range(repeats):
        work()
    clock.synchronize()
    marks = [clock.now()]
    for _ in range(repeats):
        work()
        marks.append(clock.now())
    clock.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return statistics.median(clock.seconds(begin, end) for begin, end in pairs)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class MinimalWork:
    """The unavoidable work of a part: bytes read and written, FLOPs of products in a `dtype`."""

    bytes: int
    flops: int = 0
    dtype: str = "fp32"

    def seconds(self, card: CardResult) -> float:
        """The bound in seconds: the longer of memory traffic and products."""
        moving = self.bytes / (card.copy_gb_s * 1e9)
        if self.flops == 0:
            return moving
        return max(moving, self.flops / (card.matmul_tflops[self.dtype] * 1e12))


@dataclass(frozen=True)
class RoutedLoad:
    """The work that the routing of one layer demands: T `tokens`, and R `rows` for FFN experts.

    `ffn_tokens` have at least one FFN expert, `used_tokens` a copy or constant expert, for which
    their input is read, and `busy_experts` are FFN experts with at least one row.
    """

    tokens: int
    rows: int
    ffn_tokens: int
    used_tokens: int
    busy_experts: int

    @classmethod
    def of(cls, picks: Tensor, shape: PaperShape) -> RoutedLoad:
        """Count [T, K] selections; experts in their fixed order."""
        is_ffn = picks < shape.experts.num_ffn_experts
        zero_expert = shape.experts.columns(ZERO).start
        return cls(
            tokens=picks.shape[0],
            rows=int(is_ffn.sum()),
            ffn_tokens=int(is_ffn.any(dim=1).sum()),
            used_tokens=int((~is_ffn & (picks < zero_expert)).any(dim=1).sum()),
            busy_experts=int(picks[is_ffn].unique().numel()),
        )


def layer_work(
    shape: PaperShape,
    load: RoutedLoad,
    dtype: str,
    *,
    topk: int,
    vanilla: bool,
    fused: bool = False,
) -> dict[str, MinimalWork]:
    """Return the unavoidable work of each part in one forward pass, by part.

    `dtype` is "fp32", "bf16" or "fp8", whose activations and weights are bf16 in memory. A
    `vanilla` layer has no zero-computation experts and no gating residual. With `fused`, one kernel
    combines and adds up zero-computation experts.
    """
    width = {"fp32": 4, "bf16": 2, "fp8": 2}[dtype]
    vector = shape.hidden_size * width
    work = {
        "router": _router(shape, load, width, vanilla),
        "dispatch": _dispatch(shape, load, vector),
        "experts": _experts(shape, load, width, dtype),
        "combine": MinimalWork(load.rows * vector + load.tokens * vector),
    }
    if vanilla:
        return work
    experts = shape.experts
    mixed = experts.num_constant_experts
    weights = experts.local_parameters(shape.hidden_size, is_first=True) * width
    # Fused, they write mixing logits only.
    written = load.tokens * (2 * mixed * _FP32 if fused else vector)
    work["zero_computation"] = MinimalWork(load.used_tokens * vector + weights + written)
    if fused:
        work["combine"] = _fused_combine(load, mixed, vector, topk)
    return work


def bounds_ms(work: Mapping[str, MinimalWork], card: CardResult) -> dict[str, float]:
    """The bound of each part in milliseconds, by part."""
    return {part: value.seconds(card) * 1e3 for part, value in work.items()}


def _router(shape: PaperShape, load: RoutedLoad, width: int, vanilla: bool) -> MinimalWork:
    """Work of the router: fp32 logits, and a product with E x E for the residual."""
    hidden, tokens = shape.hidden_size, load.tokens
    experts = (shape.experts.vanilla if vanilla else shape.experts).num_experts
    residual = 0 if vanilla else experts
    read = (tokens + experts) * hidden * width + residual * (tokens * _FP32 + experts * width)
    # Logits are an output where the next router adds them up, and no more than scratch otherwise.
    logits = 0 if vanilla else tokens * experts * _FP32
    written = logits + tokens * experts * (_FP32 + _BOOL)
    return MinimalWork(read + written, 2 * tokens * experts * (hidden + residual), "fp32")


def _dispatch(shape: PaperShape, load: RoutedLoad, vector: int) -> MinimalWork:
    gates_and_map = 2 * load.rows * _FP32 + load.tokens * shape.experts.num_ffn_experts * _BOOL
    return MinimalWork((load.ffn_tokens + load.rows) * vector + gates_and_map)


def _experts(shape: PaperShape, load: RoutedLoad, width: int, dtype: str) -> MinimalWork:
    """Work of SwiGLU experts: gate and up projections [D, 2 H], down projection [H, D]."""
    matrices = FFN.parameters(shape.hidden_size, shape.ffn_hidden_size)
    moved = load.busy_experts * matrices * width + 2 * load.rows * shape.hidden_size * width
    flops = load.rows * FFN.flops(shape.hidden_size, shape.ffn_hidden_size)
    return MinimalWork(moved, flops, dtype)


def _fused_combine(load: RoutedLoad, mixed: int, vector: int, topk: int) -> MinimalWork:
    """`kernels.combine`: rows, x and output; row table, gates, map and mixing logits of tokens."""
    # V comes from the cache but once, and is not counted.
    small = load.tokens * (4 * topk + (1 + mixed) * (_FP32 + _BOOL) + 2 * mixed * _FP32)
    return MinimalWork((load.rows + load.used_tokens + load.tokens) * vector + small)
