"""A real file system that fills up under a run: no save ends it, and it saves again with room."""

import shutil

import pytest
import yaml

from tests.commands import moepp, succeeded
from tests.full_disk import fill
from tests.parallel.checkpoint_runs import logged, train_on_when_saves_fail, trainer_settings
from tests.parallel.saving_runs import Run, names
from tests.parallel.training_runs import begin

# A checkpoint of some 12 MB, with tensors larger than the buffer of a file: only then does
# torch.save fail in its own way.
WIDE = {"hidden_size": 128, "ffn_hidden_size": 128, "num_layers": 2}
BATCH = {"micro_batch_size": 8}


def save_before_in_and_after_a_full_disk(disk, is_async):
    """Errors of three saves, and what is there after the second."""
    import torch.distributed as dist

    run = Run(disk / "checkpoints", WIDE, async_save=is_async, keep=1)
    run.step()
    errors = [run.save()]
    if dist.get_rank() == 0:
        fill(disk, leave=3 << 20)
    dist.barrier()
    run.step()
    errors.append(run.save())
    left = names(disk / "checkpoints")
    dist.barrier()
    if dist.get_rank() == 0:
        (disk / "ballast").unlink()
    dist.barrier()
    run.step()
    return [*errors, run.save()], left


@pytest.mark.parametrize("is_async", [False, True])
def test_saves_go_on_with_room(ranks, small_disk, is_async):
    results = ranks(2).run(save_before_in_and_after_a_full_disk, small_disk, is_async)
    for (before, full, after), left in results:
        assert before is None
        assert "No space left on device: '" in full
        assert "MiB needed, 3.0 MiB free" in full
        assert left == ["latest", "step_00000001"]
        assert after is None
    assert names(small_disk / "checkpoints") == ["latest", "step_00000003"]


def test_train_command(corpus, small_disk, tmp_path):
    run = small_disk / "run"
    checkpoints = run / "checkpoints"
    raw = trainer_settings(
        corpus,
        run,
        model=WIDE,
        training={"train_iters": 4, **BATCH},
        checkpoint={"save_interval": 1, "keep": 2, "async_save": True},
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    # Two fit, and keeping two takes room for three.
    reasons = "needs room for 3 more checkpoints of", "No space left on device"
    alert = train_on_when_saves_fail(config, run, 4, *reasons)
    assert names(checkpoints) == ["latest", "step_00000001", "step_00000002"]
    # In the background two failures may be found at once; the last save's is reported, too.
    assert alert["value"] == 2

    # Room for another checkpoint, all of it taken by what a killed run has left.
    shutil.rmtree(checkpoints / "step_00000001")
    leftover = checkpoints / ".step_00000099.incomplete-elsewhere-1-ab"
    leftover.mkdir()
    fill(leftover)
    second = succeeded(moepp("train", config, "--resume", "checkpoint.keep=1"))
    assert "Traceback" not in second.stderr
    assert logged(run, "step") == [1, 2, 3, 4]
    assert names(checkpoints) == ["latest", "step_00000004"]


def train_on_a_disk_that_stays_full(raw, disk):
    """Return what the trainer reports missing at the end, where the disk is full from step 3 on."""
    from unittest import mock

    from moepp_megatron.training import trainer as module

    step = module.training_step

    def fill_before_step_3(*args):
        if trainer.progress.step == 2:
            fill(disk)
        return step(*args)

    config, layout = begin(raw)
    with mock.patch.object(module, "training_step", fill_before_step_3):
        trainer = module.Trainer(config, layout)
        trainer.run()
    assert trainer.progress.step == 4
    return trainer.failure


def test_a_disk_that_stays_full(on_one_rank, corpus, small_disk):
    run = small_disk / "run"
    training = {"train_iters": 4, **BATCH}
    raw = trainer_settings(
        corpus, run, model=WIDE, training=training, checkpoint={"save_interval": 2}
    )
    failure = on_one_rank(train_on_a_disk_that_stays_full, raw, small_disk)
    saved, _, records = failure.partition("; ")
    assert "step_00000004 could not be written: [Errno 28] No space left on device" in saved
    assert "the last records of metrics could not be written: " in records
    # Whole lines, in order, as far as there was room.
    steps = logged(run, "step")
    assert steps[:2] == [1, 2]
    assert steps == list(range(1, len(steps) + 1))
