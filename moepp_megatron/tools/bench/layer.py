"""`moepp bench layer`: the MoE++ layer against the vanilla layer at the paper's shapes and taus."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moepp_megatron.layer_settings import Fused
from moepp_megatron.tools.bench.bounds import bounds_ms, expert_flops
from moepp_megatron.tools.bench.card import CardResult, measure_card
from moepp_megatron.tools.bench.clock import interleaved, speedup
from moepp_megatron.tools.bench.contestants import Contestant
from moepp_megatron.tools.bench.parts import parts_ms
from moepp_megatron.tools.bench.shapes import PaperShape


@dataclass(frozen=True)
class LayerResult:
    """One line of the benchmark.

    Of the vanilla layer and of the MoE++ layer: median milliseconds of the pass (`ms`), bytes that
    autograd keeps (`_kept_bytes`), median milliseconds of each part of a forward pass (`parts_ms`)
    and the least that it can take on this GPU (`bounds_ms`, see `bounds.py`), FLOPs of the FFN
    experts in this pass over the layer's whole time (`tflops`) and, forward, over the experts' part
    (`experts_tflops`), and the class of its FFN experts (`experts`).

    Attributes:
        shape: The paper's name of the model.
        tau: Weight of a zero-computation expert in the balance.
        dtype: "fp32", "bf16" or "fp8".
        tokens: Tokens of a pass.
        phi: FFN experts' share of all selections.
        pass_name: "forward" or "forward_backward".
        speedup: Vanilla time over MoE++ time, median of the rounds' ratios.
        paper_efficiency: The paper's efficiency, from expert forward times; None if it has none.
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
        fp8_recipe: `precision.fp8_recipe`, for "fp8".
        fused: `moe.fused`.
    """

    dtype: str
    tokens: int
    rounds: int
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
    build = partial(
        Contestant,
        dtype=setting.dtype,
        num_tokens=setting.tokens,
        fp8_recipe=setting.fp8_recipe,
        fused=setting.fused,
    )
    for shape in shapes:
        # Its routing does not depend on tau.
        vanilla = build(shape, 1.0, vanilla=True)
        for tau in taus:
            moepp = build(shape, tau, vanilla=False)
            for name in passes:
                progress(f"{shape.name}, tau {tau:g}, {name.replace('_', ' and ')}")
                yield _measure(shape, tau, name, vanilla, moepp, setting, card)
            del moepp
            gc.collect()
        del vanilla
        gc.collect()


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
    works = {key: getattr(value, method) for key, value in contestants.items()}
    times = interleaved(works, setting.rounds, warmup=2)
    sides: dict[str, Any] = {}
    for key, value in contestants.items():
        parts = parts_ms(value.layer, value.forward_only, setting.rounds)
        flops = expert_flops(shape, value.load.rows)
        passes = 1 if name == "forward" else 3
        numbers = {
            "ms": times[key].median_ms,
            "kept_bytes": _kept_bytes(value.forward, list(value.layer.parameters())),
            "parts_ms": parts,
            "bounds_ms": bounds_ms(value.work, card),
            "tflops": passes * flops / times[key].median_ms / 1e9,
            "experts_tflops": flops / parts["experts"] / 1e9,
            "experts": value.experts,
        }
        sides |= {f"{key}_{number}": found for number, found in numbers.items()}
    return LayerResult(
        shape=shape.name,
        tau=tau,
        dtype=setting.dtype,
        tokens=setting.tokens,
        phi=shape.experts.phi(tau),
        pass_name=name,
        speedup=speedup(times["vanilla"], times["moepp"]),
        paper_efficiency=shape.paper_efficiency(tau),
        fp8_recipe=setting.fp8_recipe if setting.dtype == "fp8" else None,
        constants=shape.experts.num_constant_experts,
        fused=setting.fused,
        device=card.device,
        matmul_tflops=card.matmul_tflops[setting.dtype],
        copy_gb_s=card.copy_gb_s,
        **sides,
    )


def _kept_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps after `forward`, each storage once, parameters left out.

    Args:
        forward: Runs the forward pass; its result is freed without a backward pass.
        parameters: The layer's parameters, which are not counted.
    """
    parameter_storages = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    # Held until the end: a freed address could be taken again and be counted as the same.
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameter_storages:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
