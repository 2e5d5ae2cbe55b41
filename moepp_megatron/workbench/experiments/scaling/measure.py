"""One point of a scaling test: MoE++ and its vanilla baseline in turn on the same ranks.

Routing is held at the balanced share phi and the tokens are random, so the result depends neither
on training nor on data. Step times come first; the all-to-alls are measured in separate steps,
whose own time counts for nothing but the share.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.workbench.bench.all_to_all_clock import AllToAllClock
from moepp_megatron.workbench.bench.clock import interleaved
from moepp_megatron.workbench.bench.step import Stepper
from moepp_megatron.workbench.experiments.scaling.records import KindResult, PointResult
from moepp_megatron.workbench.experiments.scaling.trials import Measuring, PointTrial

# Dispatchers that send through `all_to_all_single`.
_ALL_TO_ALL = ("alltoall", "alltoall_dedup")


def measure_on_rank(
    config: Config, trial: PointTrial, measuring: Measuring, rank: RankEnvironment
) -> None:
    """Be one rank of one point, from joining the others to leaving them; rank 0 writes the result.

    Args:
        config: Configuration of the test.
        trial: What to measure.
        measuring: How.
        rank: Which rank this is.
    """
    own = trial.point.config(config)
    layout = Layout.from_config(own, rank.world_size)
    with distributed.initialized(rank) as device:
        distributed.build_groups(own, layout)
        result = measure_point(own, layout, measuring, device)
        if rank.rank == 0:
            trial.finish(result)


def measure_point(
    config: Config, layout: Layout, measuring: Measuring, device: torch.device
) -> PointResult:
    """Measure; every rank must call, and all get the same. Groups exist.

    Args:
        config: A MoE++ configuration in this point's layout.
        layout: The rank grid.
        measuring: The models, and the numbers of steps.
        device: This rank's device.
    """
    configs = {"moepp": config, "vanilla": vanilla(config)}
    steppers = {kind: Stepper(configs[kind], layout) for kind in measuring.kinds}
    for _ in range(measuring.warmup):
        for stepper in steppers.values():
            stepper.step()

    def repetition(stepper: Stepper) -> None:
        for _ in range(measuring.steps):
            stepper.step()

    contestants = {kind: (lambda s=stepper: repetition(s)) for kind, stepper in steppers.items()}
    times = interleaved(contestants, measuring.repeats, warmup=0)
    clocks = {kind: _clock(configs[kind], device) for kind in steppers}
    exchanges = _all_to_alls(steppers, clocks, measuring, device)
    return PointResult(
        tokens=config.training.global_batch_size * config.model.seq_length,
        phi=config.moe.ffn_share,
        backend=dist.get_backend(),
        device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        hosts=_hosts(),
        cores=len(os.sched_getaffinity(0)),
        kinds={
            kind: KindResult.model_validate(
                {
                    "step_times_s": _reduced(
                        [s / measuring.steps for s in times[kind].seconds], device, "max"
                    ),
                    **{name: counted[name] for name in ("ffn_fraction", "a2a_bytes")},
                    **exchanges[kind],
                }
            )
            for kind, stepper in steppers.items()
            for counted in [stepper.routing.collect()]
        },
    )


def _clock(config: Config, device: torch.device) -> AllToAllClock | None:
    """The clock; None if the dispatcher does not use all-to-alls that can be timed."""
    if config.moe.dispatcher not in _ALL_TO_ALL:
        return None
    group = parallel_state.get_expert_model_parallel_group()
    return AllToAllClock(group, config.model.hidden_size, device.type == "cuda")


def _all_to_alls(
    steppers: dict[str, Stepper],
    clocks: dict[str, AllToAllClock | None],
    measuring: Measuring,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """The fields `a2a_*` of each model that come from clocks; none without a clock."""
    timed: dict[str, list[tuple[float, float]]] = {kind: [] for kind in steppers}
    for _ in range(max(3, measuring.steps)):
        for kind, stepper in steppers.items():
            clock = clocks[kind]
            if clock is None:
                # Counted from the routing all the same.
                stepper.step()
                continue
            clock.reset()
            torch.cuda.synchronize()
            began = time.perf_counter()
            with clock.running():
                stepper.step()
            torch.cuda.synchronize()
            timed[kind].append((time.perf_counter() - began, clock.seconds()))
    return {
        kind: {} if clock is None else _over_ranks(timed[kind], clock.vector_bytes, device)
        for kind, clock in clocks.items()
    }


def _over_ranks(
    timed: Sequence[tuple[float, float]], vector_bytes: int, device: torch.device
) -> dict[str, float]:
    """From this rank's seconds of steps and of waits; every rank must call."""
    step_s, wait_s = zip(*timed, strict=True)
    steps = _reduced(step_s, device, "max")
    mean, least, most = (_reduced(wait_s, device, how) for how in ("mean", "min", "max"))
    total = _reduced([float(vector_bytes)], device, "mean")[0] * dist.get_world_size()
    return {
        "a2a_time_s": statistics.median(mean),
        "a2a_time_min_s": statistics.median(least),
        "a2a_time_max_s": statistics.median(most),
        "a2a_share": statistics.median(m / s for m, s in zip(mean, steps, strict=True)),
        "a2a_sent_bytes": round(total),
    }


def _reduced(values: Sequence[float], device: torch.device, how: str) -> list[float]:
    """Elementwise mean, min or max over ranks; every rank must call."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    operations = {"mean": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    dist.all_reduce(tensor, operations[how])
    if how == "mean":
        tensor /= dist.get_world_size()
    reduced: list[float] = tensor.tolist()
    return reduced


def _hosts() -> int:
    """Machines of the run; every rank must call."""
    names: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names))
