"""One layout of one model with its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from moepp_megatron.config import Config
from moepp_megatron.config.flops import training_flops_per_token
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.workbench.planning.batch_ramp import RampStage, ramp_stages
from moepp_megatron.workbench.planning.coster import GIB
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.imbalance import AssumedRouting
from moepp_megatron.workbench.planning.machine import Machine
from moepp_megatron.workbench.planning.memory import fullest_rank
from moepp_megatron.workbench.planning.overlay import settings_of
from moepp_megatron.workbench.planning.pipeline import even_stages
from moepp_megatron.workbench.planning.step import StepTime, expert_load, step_time
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True)
class Planned:
    """One layout of one model.

    Attributes:
        grid: The layout.
        kind: The model.
        tau: Weight of its zero-computation experts; None for vanilla.
        ffn_share: phi; 1 for vanilla.
        fits: Whether the fullest rank fits the GPU.
        memory_gib: Memory of the fullest rank, GiB, libraries included.
        step: Time of a step.
        tokens_per_s_per_gpu: Throughput of a GPU.
        tflops_per_gpu: Model TFLOP/s of a GPU, as `metrics.jsonl` counts them (config/flops.py).
        mfu: Their share of the rated rate.
        vanilla_step_s: Step of the vanilla model in the same layout; None for vanilla itself.
        vanilla_fits: Whether it fits there; the ratio is of speed alone where it does not.
        ramp: Smaller steps at the beginning of a run.
    """

    grid: Grid
    kind: Literal["moepp", "vanilla"]
    tau: float | None
    ffn_share: float
    fits: bool
    memory_gib: float
    step: StepTime
    tokens_per_s_per_gpu: float
    tflops_per_gpu: float
    mfu: float
    vanilla_step_s: float | None = None
    vanilla_fits: bool = True
    ramp: tuple[RampStage, ...] = ()

    def run_seconds(self, tokens: float) -> float:
        """Time of the steps that read so many tokens from a run's beginning on, seconds."""
        seconds = 0.0
        for stage in self.ramp:
            read = min(tokens, stage.tokens)
            seconds += read / stage.tokens_per_s
            tokens -= read
        return seconds + tokens / (self.tokens_per_s_per_gpu * self.grid.world)

    def record(self, layers: int) -> dict[str, Any]:
        """A dictionary for JSON; the contract's keys come first."""
        settings = settings_of(self.grid, layers)
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
            "vanilla_step_time_s": self.vanilla_step_s,
            "vanilla_fits": self.vanilla_fits,
            "seconds": dict(self.step.seconds),
            "hidden_seconds": dict(self.step.hidden),
            "rank_load": {
                "mean": self.step.load.mean,
                "p50": self.step.load.median,
                "p90": self.step.load.p90,
                "p99": self.step.load.p99,
            },
        }


def planned_of(
    config: Config, grid: Grid, held: float, fits: bool, machine: Machine, routing: AssumedRouting
) -> Planned:
    """A layout with its numbers."""
    load = Workload.from_config(config)
    step = step_time(load, grid, machine, routing)
    tokens = config.training.global_batch_size * config.model.seq_length
    rate = tokens / step.total / grid.world
    tflops = rate * training_flops_per_token(config, config.moe.ffn_share) / 1e12
    peak = machine.hardware.peak_tflops(config.precision.dtype, config.precision.fp8)
    assert peak is not None, "formats were checked"
    is_vanilla = config.moe.num_zero_computation_experts == 0
    beside, has_room = None, True
    if not config.moe.is_vanilla:
        beside, has_room = _vanilla_step(config, grid, machine, routing)
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
        vanilla_step_s=beside,
        vanilla_fits=has_room,
        ramp=tuple(ramp_stages(config, load, grid, machine, routing)),
    )


def _vanilla_step(
    config: Config, grid: Grid, machine: Machine, routing: AssumedRouting
) -> tuple[float, bool]:
    """Step of the vanilla model in a layout, seconds, and whether it fits."""
    load = Workload.from_config(vanilla(config))
    if load.experts.dispatcher == "alltoall_dedup":
        load = load.with_dispatcher("alltoall")
    stages = even_stages(load.layers, grid.pp, grid.vpp)
    skew = expert_load(load, grid, routing).p99
    held = fullest_rank(load, grid, stages, skew).total + machine.reached.reserved_gib * GIB
    return step_time(load, grid, machine, routing).total, held <= machine.usable_bytes
