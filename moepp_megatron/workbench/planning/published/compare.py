"""Compares the model with each published result, with one set of efficiencies for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.config.hardware import load_hardware
from moepp_megatron.workbench.planning.efficiency import DEFAULT, Efficiencies
from moepp_megatron.workbench.planning.grid import Grid
from moepp_megatron.workbench.planning.machine import machine_of
from moepp_megatron.workbench.planning.pipeline import even_stages
from moepp_megatron.workbench.planning.published.results import Published
from moepp_megatron.workbench.planning.step import StepTime, step_time
from moepp_megatron.workbench.planning.workload import Workload


@dataclass(frozen=True)
class PublishedComparison:
    """A published result and the model's estimate.

    Attributes:
        result: The published result.
        step: The model's step time.
        tflops: Model TFLOP/s per GPU of the estimate.
    """

    result: Published
    step: StepTime
    tflops: float

    @property
    def error(self) -> float:
        """Relative error: above 0 the model is too fast."""
        return self.tflops / self.result.tflops - 1.0


def compare(
    results: Sequence[Published], reached: Efficiencies = DEFAULT
) -> list[PublishedComparison]:
    """The model's answer for each result, all with the same efficiencies."""
    machine = machine_of(load_hardware("h100_sxm"), reached)
    comparisons = []
    for result in results:
        stages = result.stages or even_stages(result.load.layers, result.grid.pp, result.grid.vpp)
        step = step_time(result.load, result.grid, machine, result.routing, stages)
        flop = model_flop_per_token(result.load) * result.load.batch * result.load.seq
        comparisons.append(
            PublishedComparison(result, step, flop / step.total / result.gpus / 1e12)
        )
    return comparisons


def error_table(comparisons: Sequence[PublishedComparison]) -> str:
    """The comparisons as a table for docs/planning.md."""
    lines = [
        "| result | GPUs | layout | published | model | error |",
        "|---|---|---|---|---|---|",
    ]
    for one in comparisons:
        result = one.result
        lines.append(
            f"| {result.name} | {result.gpus:,} | {_layout(result.grid)} | {result.tflops:g} "
            f"| {one.tflops:.0f} | {one.error:+.1%} |"
        )
    return "\n".join(lines)


def _layout(grid: Grid) -> str:
    return " ".join(grid.splits) + (", overlap" if grid.expert_overlap else "")


def model_flop_per_token(load: Workload) -> float:
    """Model FLOP of forward and backward pass per token, counted like Megatron-LM.

    Its `num_floating_point_operations`: products of the tokens' own experts, output layer and
    multi-token prediction included, causal scores counted half, recomputation not.
    """
    attention, experts = load.attention, load.experts
    weights = sum(m.outputs * m.inputs for m in attention.matmuls(load.hidden, 1))
    scores = load.causal_share * load.seq * attention.heads
    core = scores * (attention.qk_dim + attention.v_dim)
    per_moe = experts.ffn_per_token * 3 * load.hidden * experts.ffn_size
    per_moe += 3 * load.hidden * experts.shared_size + experts.num_experts * load.hidden
    moe_layers = sum(load.is_moe) + load.extra_layers
    layers = load.layers + load.extra_layers
    total = layers * (weights + core) + moe_layers * per_moe
    total += sum(not kind for kind in load.is_moe) * 3 * load.hidden * load.dense_size
    total += load.extra_layers * 2 * load.hidden**2
    total += (1 + load.extra_layers) * load.vocab * load.hidden
    return 6.0 * total
