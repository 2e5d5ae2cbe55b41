"""Validation losses: of the data that is trained on, and of further sets by name."""

from typing import Any

import torch

from moepp_megatron.config import Config, Layout
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.part import Fields, Part, PartContext, Step
from moepp_megatron.training.setup import TrainingModel
from moepp_megatron.training.step import run_schedule
from moepp_megatron.training.step_sums import mean_loss, zeros


class ValidationPart(Part):
    """Validates every `training.eval_interval` steps and after the last one."""

    def __init__(self, run: PartContext) -> None:
        self._run = run

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if there is something to validate on."""
        exists = run.valid_set is not None or bool(run.valid_sets)
        return exists and run.config.training.eval_iters > 0

    def wants_record(self, step: int) -> bool:
        """True if it validates after `step`."""
        return self._run.is_due(step, self._run.config.training.eval_interval, at_end=True)

    def record(self, step: Step, fields: Fields) -> Fields:
        """The losses of all sets; a collective."""
        if not self.wants_record(step.number):
            return {}
        run = self._run

        def loss_of(dataset: Any) -> float:
            return validation_loss(run.model, dataset, run.config, run.layout)

        with run.supervisor.during("evaluation"):
            return {
                "valid_loss": None if run.valid_set is None else loss_of(run.valid_set),
                "valid_set_loss": {name: loss_of(each) for name, each in run.valid_sets.items()}
                or None,
            }


@torch.no_grad()
def validation_loss(model: TrainingModel, dataset: Any, config: Config, layout: Layout) -> float:
    """Token mean over the first `training.eval_iters` global batches of the validation set.

    The same sequences every time, so that values compare. Every rank must call.
    """
    model.set_training(False)
    batches = rank_batches(dataset, 0, config, len(model.chunks))
    losses = zeros(2)
    with model.gathered_parameters():
        for _ in range(config.training.eval_iters):
            losses += run_schedule(
                model, batches, config, layout.num_microbatches, forward_only=True
            )
    model.set_training(True)
    return mean_loss(losses)
