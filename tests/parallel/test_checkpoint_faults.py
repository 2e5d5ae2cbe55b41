"""Disks that fail during a save: all ranks notice, none counts, training continues."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time

import pytest

from tests.full_disk import fill, torch_error
from tests.parallel.checkpoint_runs import (
    Messages,
    logged,
    run_trainer,
    trainer_of,
    trainer_settings,
)
from tests.parallel.saving_runs import Run, names


@contextlib.contextmanager
def full_disk(fault):
    """A disk that takes no more than `fault` says, on the rank that enters."""
    from moepp_megatron.training.checkpoint import save, state

    owner, name, limited = save.Save, "_write_files", None
    if fault == "index":
        name = "_write_index"
    elif fault == "state":
        owner, name = state, "model_state"  # type: ignore[assignment]
    elif fault == "memory":
        name = "load"
    elif fault == "manifest":
        owner, name = save, "write_synced"  # type: ignore[assignment]
    elif fault == "torch":
        owner, name = save.FileSystemWriterAsync, "write_preloaded_data"  # type: ignore[assignment]
    elif fault == "file size":
        # A real refusal of the kernel, in the middle of a file.
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)
    elif fault == "killed":
        pass
    original = getattr(owner, name)

    def fails(*args, **_):
        if fault == "torch":
            return args[1], torch_error()
        if fault in ("state", "memory"):
            raise MemoryError("not enough memory")
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "manifest" and "integrity" not in str(args[0]):
            return original(*args)
        raise OSError(errno.ENOSPC, "No space left on device", str(args[0]))

    if limited is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limited[1]))
    else:
        setattr(owner, name, fails)
    try:
        yield
    finally:
        if limited is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, limited)
        setattr(owner, name, original)


def save_with_faults(folder, faults, is_async):
    """Of each fault: a good save, one with the fault on one rank, another good one."""
    run = Run(folder, async_save=is_async)
    return [save_with_fault(run, folder / fault, fault, bad_rank) for fault, bad_rank in faults]


def save_with_fault(run, folder, fault, bad_rank):
    import torch.distributed as dist

    run.begin_in(folder)
    run.step()
    assert run.save() is None
    run.step()
    is_bad = dist.get_rank() == bad_rank
    with Messages() as messages, full_disk(fault) if is_bad else contextlib.nullcontext():
        error = run.save()
    dist.barrier()
    between = names(folder)
    # Nobody may look before everybody has looked.
    dist.barrier()
    run.step()
    assert run.save() is None
    return {"error": error, "between": between, "failed": run.writer.failed_saves, "log": messages}


# The rank on which each fails, of saves in the foreground and in the background.
FAULTS = {
    False: [("file", 1), ("file size", 0), ("torch", 1), ("manifest", 0), ("memory", 1)],
    True: [("file", 1), ("file size", 1), ("torch", 0), ("index", 0), ("killed", 1), ("state", 1)],
}


@pytest.mark.parametrize("is_async", [False, True])
def test_failed_saves_on_one_rank(ranks, tmp_path, is_async):
    by_rank = ranks(2).run(save_with_faults, tmp_path, FAULTS[is_async], is_async)
    for (fault, _), *results in zip(FAULTS[is_async], *by_rank, strict=True):
        for result in results:
            assert result["failed"] == 1, fault
            assert result["between"] == ["latest", "step_00000001"], fault
            reason = {
                "killed": "killed by signal 9",
                "file size": "File too large",
                "memory": "rank 1: MemoryError: not enough memory",
                "state": "rank 1: MemoryError: not enough memory",
            }.get(fault, "No space left")
            assert reason in result["error"], fault
        assert any("training continues" in line for line in results[0]["log"]), fault
        assert names(tmp_path / fault) == ["latest", "step_00000001", "step_00000003"]
        assert (tmp_path / fault / "latest").read_text() == "step_00000003\n"


def save_with_another_clock(folder):
    """Checkpoints, newest first, after a save by a node whose clock is behind, and one more."""
    from unittest import mock

    from moepp_megatron.training.checkpoint.find import list_checkpoints

    run, found = Run(folder, keep=2), []
    run.step()
    assert run.save() is None
    with mock.patch.object(time, "time", return_value=time.time() - 600.0):
        for _ in range(2):
            run.step()
            assert run.save() is None
            found.append([path.name for path in list_checkpoints(folder)])
    return found


def test_the_newest_checkpoint_is_the_last_one_whatever_the_clock_says(on_one_rank, tmp_path):
    found = on_one_rank(save_with_another_clock, tmp_path)
    steps = [f"step_{step:08d}" for step in (1, 2, 3)]
    assert found == [[steps[1], steps[0]], [steps[2], steps[1]]]


def lose_checkpoints(raw, lost):
    """Return what a run reports missing, and its failed saves, if a checkpoint is removed."""
    from moepp_megatron.features.callbacks.part import Callback

    class Thief(Callback):
        def saved(self, run, checkpoint):
            if checkpoint.name == f"step_{lost:08d}":
                shutil.rmtree(checkpoint)

    trainer = trainer_of(raw, [Thief()])
    trainer.run()
    return trainer.failure, trainer.checkpoints.failed_saves


@pytest.mark.parametrize("lost", [2, 3])
def test_a_checkpoint_that_is_lost_after_its_save(on_one_rank, corpus, tmp_path, lost):
    """Is reported, and is the run's failure if it was the last one."""
    raw = trainer_settings(
        corpus, tmp_path, training={"train_iters": 3}, checkpoint={"save_interval": 1}
    )
    failure, failed_saves = on_one_rank(lose_checkpoints, raw, lost)
    gone = f"checkpoint {tmp_path}/checkpoints/step_{lost:08d} was complete and is not any more"
    assert failed_saves == 1
    assert failure == (f"{gone}: is not a folder" if lost == 3 else None)
    (alert,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert json.loads(alert)["rule"] == "failed_save"
    assert gone in json.loads(alert)["condition"]


def lose_folder(raw, step, event):
    """Return what a run reports missing if its folder is removed in a step or after a save."""
    from moepp_megatron.features.callbacks.part import Callback

    class Thief(Callback):
        def after_step(self, run, record):
            if event == "step" and run.step == step:
                shutil.rmtree(raw["run"]["dir"])

        def saved(self, run, checkpoint):
            if event == "save" and run.step == step:
                shutil.rmtree(raw["run"]["dir"])

    trainer = trainer_of(raw, [Thief()])
    trainer.run()
    return trainer.failure


def test_a_run_whose_folder_is_removed(ranks, corpus, tmp_path):
    run = tmp_path / "run"
    steps = {"train_iters": 4}
    raw = trainer_settings(corpus, run, training=steps, checkpoint={"save_interval": 1})
    assert ranks(1).run(lose_folder, raw, 2, "step") == [None]
    assert logged(run, "step") == [3, 4]
    told = [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]
    assert [alert["rule"] for alert in told] == ["lost_files", "failed_save"]
    assert names(run / "checkpoints") == ["latest", *(f"step_0000000{step}" for step in (2, 3, 4))]
    assert {"config.yaml", "status.json", "tensorboard"} <= set(names(run))


def test_a_run_whose_folder_is_removed_at_its_end(on_one_rank, corpus, tmp_path):
    run = tmp_path / "run"
    steps = {"train_iters": 3}
    raw = trainer_settings(corpus, run, training=steps, checkpoint={"save_interval": 3})
    failure = on_one_rank(lose_folder, raw, 3, "save")
    saved, _, records = failure.partition("; ")
    assert saved.startswith(f"checkpoint {run}/checkpoints/step_00000003 was complete and is not")
    assert f"{run}/metrics.jsonl was removed while the run wrote it" in records


def step_while_writing(folder):
    """True if nothing is written yet after two steps on a disk that waits for them."""
    from moepp_megatron.runtime.patches import replaced
    from moepp_megatron.training.checkpoint.save import Save

    write, ready = Save._write_files, folder.with_suffix(".ready")

    def slow(self):
        while not ready.exists():
            time.sleep(0.01)
        return write(self)

    with replaced(Save, _write_files=slow):
        run = Run(folder, async_save=True)
        run.step()
        run.save(wait=False)
        run.step()
        run.step()
        waits = not any(folder.glob("step_*"))
        ready.touch()
        run.writer.finish()
    return waits


def test_training_continues_while_a_checkpoint_is_written(ranks, on_one_rank, tmp_path):
    # A snapshot, though the parameters have changed twice before they are written.
    assert ranks(1).run(step_while_writing, tmp_path / "slow") == [True]
    _ = on_one_rank(save_first_step, tmp_path / "fast")
    for folder in ("slow", "fast"):
        assert (tmp_path / folder / "step_00000001/__0_0.distcp").is_file()
    slow, fast = ranks(1).run(weights_of, [tmp_path / "slow", tmp_path / "fast"])[0]
    assert slow == fast
    # Where the run stood, too, not where it is when the files are complete.
    for folder in ("slow", "fast"):
        record = json.loads((tmp_path / folder / "step_00000001/state.json").read_text())
        assert record["progress"]["step"] == 1


def save_first_step(folder):
    run = Run(folder)
    run.step()
    assert run.save() is None


def weights_of(folders):
    """A digest of all tensors of each folder's first checkpoint."""
    import hashlib

    import torch
    import torch.distributed.checkpoint as dcp

    digests = []
    for folder in folders:
        reader = dcp.FileSystemReader(str(folder / "step_00000001"))
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in reader.read_metadata().state_dict_metadata.items()
            if hasattr(entry, "size")
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


def save_twice(folder, change):
    """Errors of a save onto the disk, and of one after `change`."""
    run = Run(folder / "checkpoints")
    run.step()
    errors = [run.save()]
    run.step()
    if change == "full":
        # Enough for a save to begin.
        fill(folder, leave=100_000)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    errors.append(run.save())
    run.step()
    return errors, names(folder / "checkpoints")


@pytest.mark.parametrize(
    ("change", "error"),
    [("full", "No space left on device"), ("read-only", "Read-only file system")],
)
def test_full_and_read_only_disks(ranks, small_disk, change, error):
    errors, left = ranks(1).run(save_twice, small_disk, change)[0]
    assert errors[0] is None
    assert errors[1] is not None
    assert error in errors[1]
    assert left == ["latest", "step_00000001"]


def test_trainer_continues_without_its_folder(ranks, corpus, tmp_path):
    # Works as root too, for whom no folder is read-only: a file stands in the folder's place.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("not a folder")
    raw = trainer_settings(
        corpus, tmp_path / "run", training={"train_iters": 3}, checkpoint={"save_interval": 1}
    )
    messages = ranks(1).run(run_trainer, raw)[0]
    assert logged(tmp_path / "run", "step") == [1, 2, 3]
    assert logged(tmp_path / "run", "failed_saves") == [0, 1, 2]
    for step in (2, 3):
        assert any(line.startswith(f"step {step}: checkpoint") for line in messages), messages
