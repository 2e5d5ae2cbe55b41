"""Runs of the real trainer on test ranks, with faults injected into its parts.

`run_trainer` runs on every rank. Data is synthetic; nothing in the package knows of the faults.
"""

import shutil
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest

from tests.commands import slowdown
from tests.parallel.training_runs import SyntheticDataset, begin, settings, with_first_part

BATCH = 8


@dataclass(frozen=True)
class Fault:
    """A fault: its kind, its rank, and the global batches during which it acts."""

    kind: str
    rank: int
    batches: tuple[int, ...] | None = None


def run_trainer(raw, without=(), faults=(), data=None, stop_after=None, corpus=None):
    """Train as `moepp train` does, on synthetic data."""
    import torch.distributed as dist

    from moepp_megatron.features.data_stages import part as data_stages
    from moepp_megatron.training import trainer as module
    from moepp_megatron.training.resilience import numerical_guard

    config, layout = begin(raw)
    dataset = Without(_dataset(config, data), without)
    with ExitStack() as stack:
        stack.enter_context(datasets(dataset))
        stack.enter_context(mock.patch.object(data_stages, "corpus_identity", return_value=corpus))
        # Runs are short: a jump is judged from the second loss on.
        stack.enter_context(mock.patch.object(numerical_guard, "JUDGED", 0))
        trainer = module.Trainer(config, layout)
        for fault in faults:
            if fault.rank == dist.get_rank():
                stack.enter_context(_INJECT[fault.kind](trainer, fault))
        if stop_after is not None:

            def agreed(_):
                return bool(trainer.progress.consumed_samples == stop_after * BATCH)

            stack.enter_context(mock.patch.object(module.StopRequest, "agreed", agreed))
        trainer.run()
    return trainer.pause_reason


@contextmanager
def datasets(train, validation=None):
    """Trainers have these data, and no TensorBoard, at which no test looks."""
    from moepp_megatron.observe.sinks import VIEWS
    from moepp_megatron.training import trainer

    with (
        mock.patch.dict(trainer.DATASETS, gpt=lambda *_: (train, validation, None)),
        mock.patch.object(trainer.Tokenizer, "load", return_value=None),
        mock.patch.dict(VIEWS),
    ):
        del VIEWS["TensorBoard output"]
        yield


def why_it_fails(*args, **named):
    """Message of the numerical guard that ends `run_trainer` on this rank."""
    from moepp_megatron.training.resilience.numerical_guard import NumericalFailureError

    with pytest.raises(NumericalFailureError) as caught:
        run_trainer(*args, **named)
    return str(caught.value)


def copy_as_of(step, run, folder):
    """Copy a run's folder as if the run had been killed behind the checkpoint of this step."""
    shutil.copytree(run, folder)
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if int(checkpoint.name.removeprefix("step_")) > step:
            shutil.rmtree(checkpoint)


def _dataset(config, data):
    from tests.parallel.guard_runs import DATA

    return SyntheticDataset(config, 40) if data is None else DATA[data](config, 40)


def trainer_settings(folder, **sections):
    """A configuration for `run_trainer` whose files go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    training = {
        "global_batch_size": BATCH,
        "micro_batch_size": 4,
        "eval_iters": 0,
        **sections.pop("training", {}),
    }
    # Nobody looks at what these measure.
    observe = {"token_groups": False, **sections.pop("observe", {})}
    telemetry = sections.pop("telemetry", {"interval_s": 0.0})
    raw = settings(training=training, observe=observe, telemetry=telemetry, **sections)
    raw["model"]["num_layers"] = 2
    raw["run"] = {"dir": str(folder)}
    raw["data"] = {"path": str(folder), "tokenizer": str(tokenizer)}
    return raw


class Without:
    """A data set that lacks some global batches."""

    def __init__(self, dataset, batches):
        self._dataset = dataset
        whole = len(dataset) // BATCH
        self._kept = [batch for batch in range(whole) if batch not in batches]

    def __len__(self):
        return len(self._kept) * BATCH

    def __getitem__(self, index):
        return self._dataset[self._kept[index // BATCH] * BATCH + index % BATCH]


def _is_on(trainer, fault):
    batch = trainer.progress.consumed_samples // BATCH
    return fault.batches is None or batch in fault.batches


@contextmanager
def _changed_loss(trainer, fault, factor):
    from moepp_megatron.training import step

    original = step._loss_function

    def changed(*args):
        loss, num_tokens, report = original(*args)
        if _is_on(trainer, fault):
            scale = report["loss"].new_tensor([factor, 1.0])
            return loss * factor, num_tokens, {"loss": report["loss"] * scale}
        return loss, num_tokens, report

    with mock.patch.object(step, "_loss_function", changed):
        yield


@contextmanager
def _bad_gradient(trainer, fault):
    config = trainer.model.chunks[0].config
    original = config.finalize_model_grads_func

    def finalize(*args, **kwargs):
        original(*args, **kwargs)
        if _is_on(trainer, fault):
            # Of all parameters, for the distributed optimizer reads only a rank's own shard.
            for parameter in trainer.model.models[0].parameters():
                parameter.main_grad.fill_(float("inf"))

    config.finalize_model_grads_func = finalize
    yield


@contextmanager
def _changed_weights(trainer, fault, factor):
    import torch

    from moepp_megatron.training.part import Part

    planted = []

    class Changed(Part):
        @torch.no_grad()
        def begin_step(self, step, layout):
            if not planted and _is_on(trainer, fault):
                planted.append(step)
                for parameter in trainer.model.models[0].parameters():
                    parameter.mul_(factor)

    with_first_part(trainer, Changed())
    yield


@contextmanager
def _slow(trainer, fault):
    from moepp_megatron.training import step

    original = step._forward_step

    def slow(*args, **named):
        time.sleep(0.5 * slowdown())
        return original(*args, **named)

    with mock.patch.object(step, "_forward_step", slow):
        yield


_INJECT = {
    "loss": lambda trainer, fault: _changed_loss(trainer, fault, float("nan")),
    "spike": lambda trainer, fault: _changed_loss(trainer, fault, 50.0),
    "gradient": _bad_gradient,
    "slow": _slow,
    "nan weight": lambda trainer, fault: _changed_weights(trainer, fault, float("nan")),
    "large weights": lambda trainer, fault: _changed_weights(trainer, fault, 100.0),
}
