"""One plugin of each kind; pyproject.toml beside it gives each its name.

pip install ./examples/plugins
moepp train configs/quickstart.yaml run.dir=runs/plugins data.dataset=one_batch \
    optimizer.kind=adam_l2 optimizer.decay_style=inverse_root \
    'observe.sinks=[csv]' 'run.callbacks=[patience]' 'run.parts=[mean_loss]'
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.data import Dataset

from moepp_megatron import Callback
from moepp_megatron.config import Config
from moepp_megatron.data.datasets import DATASETS
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.sinks import SinkSettings
from moepp_megatron.training.part import Part, PartContext, Step


class Patience(Callback):
    """Ends the run when the validation loss has not improved three times in a row."""

    def __init__(self) -> None:
        self.best, self.waited = math.inf, 0

    def after_step(self, run: Any, record: StepMetrics | None) -> None:
        """Compare with the best before. The record is the same on every rank."""
        if record is None or record.valid_loss is None:
            return
        self.waited = 0 if record.valid_loss < self.best else self.waited + 1
        self.best = min(self.best, record.valid_loss)
        if self.waited == 3:
            run.stop()


class MeanLoss(Part):
    """Records the mean loss of the newest steps, weighted exponentially."""

    key = "mean_loss"

    def __init__(self) -> None:
        self.mean = 0.0
        self.steps = 0

    @classmethod
    def of(cls, run: PartContext) -> MeanLoss:
        """The part of any run."""
        return cls()

    def end_step(self, step: Step) -> tuple[()]:
        """Add the loss of a step that was taken; it is the same on every rank."""
        if step.updated:
            self.steps += 1
            self.mean += (step.result.sums.loss - self.mean) / min(self.steps, 20)
        return ()

    def record(self, step: Step, fields: Mapping[str, Any]) -> dict[str, float]:
        """The mean."""
        return {"mean_loss": self.mean}

    def state(self) -> dict[str, float]:
        """Mean and number of steps, for a checkpoint."""
        return {"mean": self.mean, "steps": self.steps}

    def load(self, state: Mapping[str, Any], why: str, step: int) -> tuple[()]:
        """Continue from a checkpoint; empty where it has none."""
        self.mean, self.steps = state.get("mean", 0.0), state.get("steps", 0)
        return ()


class CsvSink:
    """Writes steps and losses to RUN/losses.csv. One rank of a run has the sinks."""

    def __init__(self, run: SinkSettings) -> None:
        # Buffering by lines, so that the file is whole up to the last record.
        self.file = (run.run_dir / "losses.csv").open("a", buffering=1, encoding="utf-8")

    def write(self, record: StepMetrics) -> None:
        """Write the record of one logged step."""
        self.file.write(f"{record.step},{record.loss}\n")

    def go_back(self, step: int) -> None:
        """Leave repeated steps in the file; the last line of a step counts."""

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class FirstBatch(Dataset):
    """The first samples of a data set over and over."""

    def __init__(self, samples: Any, count: int) -> None:
        self.samples, self.count = samples, count

    def __len__(self) -> int:
        """As many as there are."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """One of the first `count`."""
        return self.samples[index % self.count]


def one_batch(config: Config, tokenizer: Any, num_samples: tuple[int, int, int]) -> tuple:
    """Train on a single batch: a model that cannot learn it by heart has a fault."""
    train, validation, test = DATASETS["gpt"](config, tokenizer, num_samples)
    return FirstBatch(train, config.training.global_batch_size), validation, test


def inverse_root(config: Config, optimizer: Any) -> OptimizerParamScheduler:
    """After the warm-up the rate falls as one over the square root of the step."""
    settings, steps = config.optimizer, config.training.train_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=config.warmup_iters,
        lr_decay_steps=settings.decay_iters or steps,
        lr_decay_style="inverse-square-root",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def adam_l2(settings: Any) -> dict[str, Any]:
    """Adam as first published: weight decay is a part of the gradient (L2), unlike in AdamW."""
    return {
        "optimizer": "adam",
        "decoupled_weight_decay": False,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_eps": settings.adam_eps,
    }
