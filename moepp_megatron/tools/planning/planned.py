"""One layout of one model with its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Any, Literal

from moepp_megatron.config import Config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.imbalance import AssumedRouting
from moepp_megatron.tools.planning.machine import Machine
from moepp_megatron.tools.planning.memory import GIB
from moepp_megatron.tools.planning.overlay import settings_of
from moepp_megatron.tools.planning.step import StepTime, step_time
from moepp_megatron.tools.planning.workload import Workload


@dataclass(frozen=True)
class _RampStage:
    """Steps of one batch size that is not yet the whole one."""

    tokens: int  # tokens that they read
    tokens_per_s: float  # speed of all GPUs


def ramp_stages(
    config: Config, load: Workload, grid: Grid, machine: Machine, routing: AssumedRouting
) -> Iterator[_RampStage]:
    """The stages before the whole batch, in order; none without a ramp."""
    ramp, read = config.training.batch_ramp or [], 0
    for (_, size), (until, _) in zip(ramp, ramp[1:], strict=False):
        per_step = size * load.seq
        steps = max(ceil((until - read) / per_step), 0)
        if steps:
            read += steps * per_step
            step = step_time(replace(load, batch=size), grid, machine, routing)
            yield _RampStage(steps * per_step, per_step / step.total)


@dataclass(frozen=True)
class Planned:
    """One layout of one model."""

    grid: Grid  # the layout
    kind: Literal["moepp", "vanilla"]  # the model
    tau: float | None  # weight of its zero-computation experts; None for vanilla
    ffn_share: float  # phi; 1 for vanilla
    fits: bool  # whether the fullest rank fits the GPU
    memory_gib: float  # memory of the fullest rank, GiB, libraries included
    step: StepTime  # time of a step
    tokens_per_s_per_gpu: float  # throughput of a GPU
    # Model TFLOP/s of a GPU, as `metrics.jsonl` counts them (config/flops.py).
    tflops_per_gpu: float
    mfu: float  # their share of the rated rate
    # Step of this model in the fastest layout of the vanilla one, seconds; None where it has none.
    shared_step_s: float | None = None
    ramp: tuple[_RampStage, ...] = ()  # smaller steps at the beginning of a run

    def run_seconds(self, tokens: float) -> float:
        """Time of the steps that read this many tokens from a run's beginning, seconds."""
        seconds = 0.0
        for stage in self.ramp:
            read = min(tokens, stage.tokens)
            seconds += read / stage.tokens_per_s
            tokens -= read
        return seconds + tokens / (self.tokens_per_s_per_gpu * self.grid.world)

    def record(self, layers: int) -> dict[str, Any]:
        """A dictionary for JSON; the contract's keys come first."""
        settings, load = settings_of(self.grid, layers), astuple(self.step.load)
        return {
            "layout": {key: value for keys in settings.values() for key, value in keys.items()},
            "kind": self.kind,
            "tau": self.tau,
            "fits": self.fits,
            "memory_gib": round(self.memory_gib, 3),
            "step_time_s": self.step.total,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu,
            "tflops_per_gpu": self.tflops_per_gpu,
            "a2a_bytes": round(self.step.exchange_bytes),
            "ffn_share": self.ffn_share,
            "mfu": self.mfu,
            "shared_layout_step_time_s": self.shared_step_s,
            "seconds": dict(self.step.seconds),
            "hidden_seconds": dict(self.step.hidden),
            "rank_load": dict(zip(("mean", "p50", "p90", "p99"), load, strict=True)),
        }


def planned_of(
    config: Config, grid: Grid, held: float, fits: bool, machine: Machine, routing: AssumedRouting
) -> Planned:
    """A layout with its numbers."""
    load = Workload.from_config(config)
    step = step_time(load, grid, machine, routing)
    rate = load.batch * load.seq / step.total / grid.world
    tflops = rate * training_flops_per_token(config, config.moe.ffn_share) / 1e12
    peak = machine.hardware.peak_tflops(config.precision.dtype, config.precision.fp8)
    assert peak is not None, "formats were checked"
    is_vanilla = config.moe.num_zero_computation_experts == 0
    return Planned(
        grid=grid,
        kind="vanilla" if is_vanilla else "moepp",
        tau=None if is_vanilla else config.moe.balanced_tau,
        ffn_share=config.moe.ffn_share,
        fits=fits,
        memory_gib=held / GIB,
        step=step,
        tokens_per_s_per_gpu=rate,
        tflops_per_gpu=tflops,
        mfu=tflops / peak,
        ramp=tuple(ramp_stages(config, load, grid, machine, routing)),
    )
