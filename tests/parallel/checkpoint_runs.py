"""Runs that stop and resume, on test ranks."""

import json
import logging

import numpy as np

from tests.commands import moepp
from tests.parallel.training_runs import SyntheticDataset, begin, begin_training, settings

# Wide enough for every run of these tests.
NUM_STEPS = 12


class Messages(logging.Handler):
    """Collects the package's log messages for a test."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("moepp_megatron").addHandler(self)
        return self.lines

    def __exit__(self, *_):
        logging.getLogger("moepp_megatron").removeHandler(self)


def trainer_of(raw, callbacks=()):
    """A `Trainer` on this rank."""
    from moepp_megatron.training.trainer import Trainer

    return Trainer(*begin(raw), callbacks)


def run_trainer(raw):
    """A whole `Trainer` run on this rank; returns what it logged."""
    with Messages() as messages:
        trainer_of(raw).run()
    return messages


def trainer_settings(corpus, run, **sections):
    """Settings of a `Trainer` run of 20 steps on real text, in folder `run`."""
    training = {
        "train_iters": 20,
        "eval_iters": 0,
        # The sum over micro-batches is not the point: one a step on each of two ranks.
        "global_batch_size": 8,
        "micro_batch_size": 4,
        **sections.pop("training", {}),
    }
    model = {"vocab_size": 320, "num_layers": 2, **sections.pop("model", {})}
    optimizer = {"decay_iters": 20, **sections.pop("optimizer", {})}
    return settings(
        run={"dir": str(run)},
        data={"path": str(corpus)},
        training=training,
        model=model,
        optimizer=optimizer,
        **sections,
    )


def logged(run, key="loss"):
    """A value of every line of a run's metrics, by step; fails on a step that is there twice."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    assert steps == sorted(set(steps)), f"steps are logged twice or out of order: {steps}"
    return [record.get(key) for record in records]


def train_on_when_saves_fail(config, run, last, *reasons):
    """Errors of a run whose saves fail, and which says so at its end; the last alert."""
    done = moepp("train", config)
    assert done.returncode == 1
    at_the_end = "error: at the end of the run, checkpoint"
    for words in ("training continues without it", at_the_end, *reasons):
        assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert logged(run, "step") == list(range(1, last + 1))
    alerts = [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]
    assert {alert["rule"] for alert in alerts} == {"failed_save"}
    return alerts[-1]


def train_between(raw, folder, last, start=None):
    """Losses from a checkpoint (or step 0) to step `last`, which is saved into `folder`."""
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.checkpoint.files import Progress
    from moepp_megatron.training.checkpoint.read import read_checkpoint
    from moepp_megatron.training.step import training_step
    from moepp_megatron.training.step_sums import mean_loss

    config, layout, model = begin_training(raw)
    progress = Progress() if start is None else read_checkpoint(start, model, config)[0]
    dataset = SyntheticDataset(config, NUM_STEPS)
    batches = rank_batches(dataset, progress.consumed_samples, config, len(model.chunks))
    losses = []
    while progress.step < last:
        losses.append(mean_loss(training_step(model, batches, config, layout).losses))
        samples = config.training.global_batch_size
        progress = progress.after_step(samples, samples * config.model.seq_length)
    save_checkpoint(folder, model, progress, config)
    return losses


def continue_in_another_layout(ranks, folder, raw, first, second):
    """A checkpoint of two ranks in one layout; two in another continue as one process does."""
    (whole,) = ranks(1).run(train_between, raw(), folder / "whole", 3)
    begun = ranks(2).run(train_between, raw(parallel=first), folder / "half", 1)[0]
    (start,) = (folder / "half").glob("step_*")
    # Two steps: the second loss follows from the weights and the optimizer's state.
    ended = ranks(2).run(train_between, raw(parallel=second), folder / "rest", 3, start)[0]
    # fp32 rounds by 6e-8; sums in another order, carried on by steps of Adam (see test_matrix).
    np.testing.assert_allclose([*begun, *ended], whole, rtol=1e-5)
    return start


def save_checkpoint(folder, model, progress, config, tokenizer=None):
    """Save once and wait; on every rank."""
    from moepp_megatron.training.checkpoint.write import CheckpointWriter

    writer = CheckpointWriter(folder, config, tokenizer or folder / "no tokenizer")
    writer.save(model, progress)
    writer.finish()
    assert writer.error is None, writer.error
