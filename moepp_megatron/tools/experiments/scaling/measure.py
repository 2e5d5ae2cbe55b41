"""One point of a scaling test: MoE++ and its vanilla baseline in turn on the same ranks.

Routing is held at the balanced share phi and the tokens are random, so the result depends neither
on training nor on data.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.tools.bench.clock import interleaved
from moepp_megatron.tools.bench.step import Stepper
from moepp_megatron.tools.experiments.scaling.records import KindResult, PointResult
from moepp_megatron.tools.experiments.scaling.trials import Measuring, PointTrial


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
                    "step_times_s": _slowest(
                        [s / measuring.steps for s in times[kind].seconds], device
                    ),
                    **{name: counted[name] for name in ("ffn_fraction", "a2a_bytes")},
                }
            )
            for kind, stepper in steppers.items()
            for counted in [stepper.routing.collect()]
        },
    )


def _slowest(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise maximum over ranks; every rank must call."""
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    reduced: list[float] = tensor.tolist()
    return reduced


def _hosts() -> int:
    """Machines of the run; every rank must call."""
    names: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names))
