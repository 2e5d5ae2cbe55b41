"""The learning rate and the batch size of every step, as megatron-core computes them."""

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING

from megatron.core.num_microbatches_calculator import (
    ConstantNumMicroBatchesCalculator,
    StepBatchsizeNumMicroBatchesCalculator,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.choices import pick

# Further seconds of imports, before a drawing of a schedule.
if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer

# megatron-core's calculators print what they do on rank 0.
_SILENT = -1


def build_schedule(
    config: Config, optimizer: "MegatronOptimizer | SimpleNamespace"
) -> OptimizerParamScheduler:
    """The schedule that sets the learning rate and the weight decay of an optimizer's groups."""
    build = pick(SCHEDULES, "optimizer.decay_style", config.optimizer.decay_style, "schedules")
    return build(config, optimizer)


def _megatron_schedule(
    config: Config, optimizer: "MegatronOptimizer | SimpleNamespace"
) -> OptimizerParamScheduler:
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=config.warmup_iters,
        lr_decay_steps=settings.decay_iters or config.training.train_iters,
        lr_decay_style=settings.decay_style,
        wsd_decay_steps=settings.wsd_decay_iters,
        lr_wsd_decay_style=settings.wsd_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
    )


# What `optimizer.decay_style` may name.
SCHEDULES = dict.fromkeys(
    ("cosine", "linear", "constant", "inverse-square-root", "WSD"), _megatron_schedule
)


def learning_rate(config: Config, step: int) -> float:
    """The learning rate that step `step` (from 1) of a run trains with."""
    # An optimizer without groups of parameters, since only the rate is asked for.
    schedule = build_schedule(config, SimpleNamespace(param_groups=[]))
    schedule.num_steps = step
    return float(schedule.get_lr({}))


@dataclass(frozen=True)
class _BatchStage:
    """Steps of one batch size, from `first_step`, as long as no batch is refused."""

    first_step: int
    size: int
    consumed_samples: int


class BatchSizes:
    """The batch size by the sequences that a run has read, refused batches included."""

    def __init__(self, config: Config) -> None:
        training = self._training = config.training
        self._calculator: ConstantNumMicroBatchesCalculator | StepBatchsizeNumMicroBatchesCalculator
        # With one data-parallel rank it divides by nothing that depends on the layout.
        if training.batch_ramp is None:
            self._calculator = ConstantNumMicroBatchesCalculator(
                training.global_batch_size, training.micro_batch_size, 1, False, _SILENT
            )
        else:
            self._calculator = StepBatchsizeNumMicroBatchesCalculator(
                training.micro_batch_size,
                1,
                False,
                _SILENT,
                " ".join(f"{tokens}:{size}" for tokens, size in training.batch_ramp),
                config.model.seq_length,
            )

    def at(self, consumed_samples: int) -> int:
        """Sequences of the batch that begins after this many sequences."""
        self._calculator.update(consumed_samples, consistency_check=False)
        return self._calculator.get_current_global_batch_size()

    def layout(self, layout: Layout, consumed_samples: int) -> Layout:
        """The rank grid with the number of micro-batches of that batch."""
        per_rank = self._training.micro_batch_size * layout.dp
        return replace(layout, num_microbatches=self.at(consumed_samples) // per_rank)

    def stages(self) -> list[_BatchStage]:
        """The batch sizes of a run; one stage where `training.batch_ramp` is null."""
        stages, consumed = list[_BatchStage](), 0
        for step in range(1, self._training.train_iters + 1):
            size = self.at(consumed)
            if not stages or size != stages[-1].size:
                stages.append(_BatchStage(step, size, consumed))
            if size == self._training.global_batch_size:
                break
            consumed += size
        return stages

    def planned_samples(self) -> int:
        """Sequences that `training.train_iters` steps read."""
        stages = self.stages()
        first_steps = [*(stage.first_step for stage in stages), self._training.train_iters + 1]
        steps = [last - first for first, last in pairwise(first_steps)]
        return sum(stage.size * count for stage, count in zip(stages, steps, strict=True))
