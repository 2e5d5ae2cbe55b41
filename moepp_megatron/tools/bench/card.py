"""Measures a GPU's highest rates: matrix products in each number format, and a memory copy.

`bench layer` compares with these rates. They are measured, not rated, because a GPU's clocks under
load and its libraries decide, and no layer can be faster than its product.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepp_megatron.tools.bench import clock

# As large as the products of a layer get, and enough to fill any GPU (1.1 TFLOP).
_GPU_SIZE, _CPU_SIZE = 8192, 1024
# Far more than any cache holds.
_GPU_BYTES, _CPU_BYTES = 2**30, 2**28
_GPU_REPEATS, _CPU_REPEATS = 30, 5
# Transformer Engine's quantization.py, `_compute_fp8_support`.
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class CardResult:
    """The measured rates of one GPU.

    Attributes:
        device: The GPU's name, or "cpu".
        matmul_tflops: Number format to TFLOP/s, median; formats that it cannot do are left out.
        copy_gb_s: Bytes read and written by a large copy, GB/s.
    """

    device: str
    matmul_tflops: dict[str, float]
    copy_gb_s: float


def measure_card(
    dtypes: Sequence[str], size: int | None = None, num_bytes: int | None = None
) -> CardResult:
    """Measure the current device; formats of `dtypes` that it lacks are left out.

    Args:
        dtypes: Out of fp32, bf16 and fp8.
        size: Side of the square matrices; chosen by the device where None.
        num_bytes: Bytes to copy; chosen by the device where None.
    """
    device = _device()
    on_gpu = device.type == "cuda"
    size = size or (_GPU_SIZE if on_gpu else _CPU_SIZE)
    fit = [dtype for dtype in dtypes if card_obstacle(dtype) is None]
    return CardResult(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        matmul_tflops={dtype: _matmul_tflops(dtype, size) for dtype in fit},
        copy_gb_s=_copy_gb_s(num_bytes or (_GPU_BYTES if on_gpu else _CPU_BYTES)),
    )


def card_obstacle(dtype: str) -> str | None:
    """Why this GPU has no fast product of a number format; None where it has."""
    if dtype != "fp8":
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA GPU"
    capability = torch.cuda.get_device_capability()
    needs = f"needs compute capability 8.9, not {'.'.join(map(str, capability))}"
    return needs if capability < _FP8_CAPABILITY else None


def _matmul_tflops(dtype: str, size: int) -> float:
    """TFLOP/s of a square product: fp8 has one scale per tensor and bf16 results.

    fp32 is what `precision.dtype: fp32` computes: no TF32, unless torch allows it.
    """
    product = matmul(dtype, size)
    return 2.0 * size**3 / _median_seconds(product) / 1e12


def matmul(dtype: str, size: int) -> Callable[[], Tensor]:
    """The product that `_matmul_tflops` times."""
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
    clock.settle()
    marks = [clock.now()]
    for _ in range(repeats):
        work()
        marks.append(clock.now())
    clock.settle()
    pairs = zip(marks, marks[1:], strict=False)
    return statistics.median(clock.seconds(begin, end) for begin, end in pairs)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
