"""`moepp bench layer`: the MoE++ layer against the vanilla layer at the paper's shapes and taus."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from moepp_megatron.bench.activations import kept_bytes
from moepp_megatron.bench.contestants import Contestant
from moepp_megatron.bench.interleave import interleaved, speedup
from moepp_megatron.bench.parts import parts_ms
from moepp_megatron.bench.shapes import PaperShape

PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class LayerResult:
    """One line of the benchmark.

    Attributes:
        shape: The paper's name of the model.
        tau: Weight of a zero-computation expert in the balance.
        dtype: "fp32" or "bf16".
        tokens: Tokens of a pass.
        phi: FFN experts' share of all selections.
        pass_name: "forward" or "forward_backward".
        vanilla_ms: Median milliseconds of megatron-core's layer.
        moepp_ms: Median milliseconds of the MoE++ layer.
        speedup: Vanilla time over MoE++ time, median of the rounds' ratios.
        paper_efficiency: The paper's, expert forward time on its GPUs; None where it gives none.
        vanilla_kept_bytes: What autograd keeps of the vanilla layer.
        moepp_kept_bytes: What it keeps of the MoE++ layer.
        vanilla_parts_ms: Median milliseconds a part, forward passes alone.
        moepp_parts_ms: The same of the MoE++ layer.
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

    @property
    def efficiency(self) -> float:
        """Speedup times phi: how much of the possible speed-up is reached."""
        return self.speedup * self.phi

    @property
    def overhead(self) -> float:
        """All of the MoE++ layer but its FFN experts, as a share of the vanilla layer's time."""
        others = sum(ms for part, ms in self.moepp_parts_ms.items() if part != "experts")
        return others / max(sum(self.vanilla_parts_ms.values()), 1e-9)


def run_layer_benchmark(
    shapes: Sequence[PaperShape],
    taus: Sequence[float],
    dtype: str,
    num_tokens: int,
    passes: Sequence[str],
    rounds: int,
    warmup: int = 2,
    progress: Callable[[str], object] = lambda what: None,
) -> Iterator[LayerResult]:
    """Yield one result a shape, tau and pass.

    Process groups must exist.

    Args:
        shapes: Which layers.
        taus: Weights of a zero-computation expert.
        dtype: "fp32" or "bf16".
        num_tokens: Tokens of a pass.
        passes: Of `PASSES`.
        rounds: Interleaved rounds a result.
        warmup: Rounds that do not count.
        progress: Told what is being measured.
    """
    for shape in shapes:
        # Its routing does not depend on tau.
        vanilla = Contestant(shape, 1.0, dtype, num_tokens, vanilla=True)
        for tau in taus:
            moepp = Contestant(shape, tau, dtype, num_tokens, vanilla=False)
            for name in passes:
                progress(f"{shape.name}, tau {tau:g}, {name.replace('_', ' and ')}")
                yield _measure(shape, tau, dtype, num_tokens, name, vanilla, moepp, rounds, warmup)
            del moepp
            gc.collect()
        del vanilla
        gc.collect()


def _measure(
    shape: PaperShape,
    tau: float,
    dtype: str,
    num_tokens: int,
    name: str,
    vanilla: Contestant,
    moepp: Contestant,
    rounds: int,
    warmup: int,
) -> LayerResult:
    method = {"forward": "forward_only", "forward_backward": "forward_backward"}[name]
    contestants = {"vanilla": vanilla, "moepp": moepp}
    times = interleaved(
        {key: getattr(value, method) for key, value in contestants.items()}, rounds, warmup
    )
    parts = {
        key: parts_ms(value.layer, value.forward_only, rounds) for key, value in contestants.items()
    }
    kept = {
        key: kept_bytes(value.forward, list(value.layer.parameters()))
        for key, value in contestants.items()
    }
    return LayerResult(
        shape=shape.name,
        tau=tau,
        dtype=dtype,
        tokens=num_tokens,
        phi=shape.ffn_share(tau),
        pass_name=name,
        vanilla_ms=times["vanilla"].median_ms,
        moepp_ms=times["moepp"].median_ms,
        speedup=speedup(times["vanilla"], times["moepp"]),
        paper_efficiency=shape.paper_efficiency(tau),
        vanilla_kept_bytes=kept["vanilla"],
        moepp_kept_bytes=kept["moepp"],
        vanilla_parts_ms=parts["vanilla"],
        moepp_parts_ms=parts["moepp"],
    )
