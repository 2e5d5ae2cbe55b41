"""`moepp bench layer`: the MoE++ layer against the vanilla layer at the paper's shapes and taus."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepp_megatron.layer_settings import Fused
from moepp_megatron.workbench.bench.bounds import bounds_ms, expert_flops
from moepp_megatron.workbench.bench.card import CardResult, measure_card
from moepp_megatron.workbench.bench.contestants import Contestant
from moepp_megatron.workbench.bench.interleave import interleaved, speedup
from moepp_megatron.workbench.bench.parts import parts_ms
from moepp_megatron.workbench.bench.shapes import PaperShape


@dataclass(frozen=True)
class LayerResult:
    """One line of the benchmark.

    Attributes:
        shape: The paper's name of the model.
        tau: Weight of a zero-computation expert in the balance.
        dtype: "fp32", "bf16" or "fp8".
        tokens: Tokens of a pass.
        phi: FFN experts' share of all selections.
        pass_name: "forward" or "forward_backward".
        vanilla_ms: Median milliseconds of megatron-core's layer.
        moepp_ms: Median milliseconds of the MoE++ layer.
        speedup: Vanilla time over MoE++ time, median of the rounds' ratios.
        paper_efficiency: The paper's efficiency, from expert forward times; None if it has none.
        vanilla_kept_bytes: Bytes that autograd keeps of the vanilla layer.
        moepp_kept_bytes: Bytes that it keeps of the MoE++ layer.
        vanilla_parts_ms: Median milliseconds per part, forward passes only.
        moepp_parts_ms: The same of the MoE++ layer.
        vanilla_bounds_ms: Least milliseconds per part on this GPU (`bounds.py`).
        moepp_bounds_ms: The same of the MoE++ layer.
        vanilla_tflops: FLOPs of the FFN experts in this pass over the layer's whole time, TFLOP/s.
        moepp_tflops: The same of the MoE++ layer.
        vanilla_experts_tflops: The experts' part alone, forward.
        moepp_experts_tflops: The same of the MoE++ layer.
        vanilla_experts: Class of its FFN experts.
        moepp_experts: The same of the MoE++ layer.
        fp8_recipe: Recipe of "fp8", None otherwise.
        constants: Constant experts of the MoE++ layer.
        fused: `moe.fused`.
        device: The GPU, or "cpu".
        matmul_tflops: Matrix product of this GPU in this number format, TFLOP/s.
        copy_gb_s: Large copy in this GPU's memory, bytes read and written, GB/s.
    """

    shape: str
    tau: float
    dtype: str
    tokens: int
    phi: float
    pass_name: str
    vanilla_ms: float
    moepp_ms: float
    speedup: float
    paper_efficiency: float | None
    vanilla_kept_bytes: int
    moepp_kept_bytes: int
    vanilla_parts_ms: dict[str, float] = field(default_factory=dict)
    moepp_parts_ms: dict[str, float] = field(default_factory=dict)
    vanilla_bounds_ms: dict[str, float] = field(default_factory=dict)
    moepp_bounds_ms: dict[str, float] = field(default_factory=dict)
    vanilla_tflops: float = 0.0
    moepp_tflops: float = 0.0
    vanilla_experts_tflops: float = 0.0
    moepp_experts_tflops: float = 0.0
    vanilla_experts: str = ""
    moepp_experts: str = ""
    fp8_recipe: str | None = None
    constants: int = 0
    fused: Fused = "auto"
    device: str = "cpu"
    matmul_tflops: float = 0.0
    copy_gb_s: float = 0.0

    @property
    def efficiency(self) -> float:
        """Speedup times phi: how much of the possible speed-up is reached."""
        return self.speedup * self.phi

    @property
    def overhead(self) -> float:
        """Time of the MoE++ layer without its FFN experts, over the vanilla layer's time."""
        others = sum(ms for part, ms in self.moepp_parts_ms.items() if part != "experts")
        return others / max(sum(self.vanilla_parts_ms.values()), 1e-9)


@dataclass(frozen=True)
class LayerSetting:
    """Settings that all results of a run share.

    Attributes:
        dtype: "fp32", "bf16" or "fp8".
        tokens: Tokens of a pass.
        rounds: Interleaved rounds per result.
        warmup: Rounds that do not count.
        fp8_recipe: `precision.fp8_recipe`, for "fp8".
        fused: `moe.fused`.
    """

    dtype: str
    tokens: int
    rounds: int
    warmup: int = 2
    fp8_recipe: str = "delayed"
    fused: Fused = "auto"


def run_layer_benchmark(
    shapes: Sequence[PaperShape],
    taus: Sequence[float],
    passes: Sequence[str],
    setting: LayerSetting,
    progress: Callable[[str], object] = lambda what: None,
) -> Iterator[LayerResult]:
    """Yield one result per shape, tau and pass.

    Process groups must exist.

    Args:
        shapes: Which layers.
        taus: Weights of a zero-computation expert.
        passes: Names out of "forward" and "forward_backward".
        setting: The common settings.
        progress: Called with a description of each measurement.
    """
    card = measure_card(("fp32", setting.dtype))
    for shape in shapes:
        # Its routing does not depend on tau.
        vanilla = _contestant(shape, 1.0, setting, vanilla=True)
        for tau in taus:
            moepp = _contestant(shape, tau, setting, vanilla=False)
            for name in passes:
                progress(f"{shape.name}, tau {tau:g}, {name.replace('_', ' and ')}")
                yield _measure(shape, tau, name, vanilla, moepp, setting, card)
            del moepp
            gc.collect()
        del vanilla
        gc.collect()


def _contestant(
    shape: PaperShape, tau: float, setting: LayerSetting, *, vanilla: bool
) -> Contestant:
    return Contestant(
        shape,
        tau,
        setting.dtype,
        setting.tokens,
        vanilla=vanilla,
        fp8_recipe=setting.fp8_recipe,
        fused=setting.fused,
    )


def _measure(
    shape: PaperShape,
    tau: float,
    name: str,
    vanilla: Contestant,
    moepp: Contestant,
    setting: LayerSetting,
    card: CardResult,
) -> LayerResult:
    method = {"forward": "forward_only", "forward_backward": "forward_backward"}[name]
    contestants = {"vanilla": vanilla, "moepp": moepp}
    times = interleaved(
        {key: getattr(value, method) for key, value in contestants.items()},
        setting.rounds,
        setting.warmup,
    )
    parts = {
        key: parts_ms(value.layer, value.forward_only, setting.rounds)
        for key, value in contestants.items()
    }
    kept = {
        key: kept_bytes(value.forward, list(value.layer.parameters()))
        for key, value in contestants.items()
    }
    flops = {key: expert_flops(shape, value.load.rows) for key, value in contestants.items()}
    passes = 1 if name == "forward" else 3
    return LayerResult(
        shape=shape.name,
        tau=tau,
        dtype=setting.dtype,
        tokens=setting.tokens,
        phi=shape.experts.phi(tau),
        pass_name=name,
        vanilla_ms=times["vanilla"].median_ms,
        moepp_ms=times["moepp"].median_ms,
        speedup=speedup(times["vanilla"], times["moepp"]),
        paper_efficiency=shape.paper_efficiency(tau),
        vanilla_kept_bytes=kept["vanilla"],
        moepp_kept_bytes=kept["moepp"],
        vanilla_parts_ms=parts["vanilla"],
        moepp_parts_ms=parts["moepp"],
        vanilla_bounds_ms=bounds_ms(vanilla.work, card),
        moepp_bounds_ms=bounds_ms(moepp.work, card),
        vanilla_tflops=_tflops(passes * flops["vanilla"], times["vanilla"].median_ms),
        moepp_tflops=_tflops(passes * flops["moepp"], times["moepp"].median_ms),
        vanilla_experts_tflops=_tflops(flops["vanilla"], parts["vanilla"]["experts"]),
        moepp_experts_tflops=_tflops(flops["moepp"], parts["moepp"]["experts"]),
        vanilla_experts=vanilla.experts,
        moepp_experts=moepp.experts,
        fp8_recipe=setting.fp8_recipe if setting.dtype == "fp8" else None,
        constants=shape.experts.num_constant_experts,
        fused=setting.fused,
        device=card.device,
        matmul_tflops=card.matmul_tflops[setting.dtype],
        copy_gb_s=card.copy_gb_s,
    )


def _tflops(flops: int, milliseconds: float) -> float:
    return flops / milliseconds / 1e9


def kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, parameters left out.

    Args:
        forward: Runs the forward pass; its result is freed without a backward pass.
        parameters: The layer's parameters, which are not counted.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    # Held until the end: a freed address could be taken again and be counted as the same.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
