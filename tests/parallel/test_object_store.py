"""Checkpoints in object storage: the same training, failed saves that end no run, no secrets."""

import os
import sys
from unittest import mock

import pytest
import yaml

from moepp_megatron.cli import main
from moepp_megatron.runtime.object_store import place
from moepp_megatron.training.checkpoint.find import find_checkpoint
from tests.commands import moepp, succeeded
from tests.object_store import SECRET
from tests.parallel.checkpoint_runs import (
    logged,
    train_between,
    train_on_when_saves_fail,
    trainer_settings,
)
from tests.parallel.training_runs import EP2, TP2, settings


def in_store(environment, function, *arguments):
    """Call a function on a rank that finds the store."""
    with mock.patch.dict(os.environ, environment):
        return function(*arguments)


def run_settings(folder, parallel, **checkpoint):
    return settings(
        run={"dir": str(folder)},
        model={"num_layers": 2},
        parallel=parallel,
        training={"global_batch_size": 4, "micro_batch_size": 2},
        checkpoint=checkpoint,
    )


def test_the_same_training_continues(ranks, store, tmp_path):
    """In the layout that saved, and in another one, bit for bit what a local checkpoint gives."""
    near = tmp_path / "near"
    ranks(2).run(train_between, run_settings(tmp_path, EP2), near, 2)
    here = sorted(path.name for path in (near / "step_00000002").iterdir())
    starts = []
    for name, is_async in (("now", False), ("behind", True)):
        address = f"s3://{store.bucket}/runs/{name}"
        raw = run_settings(tmp_path, EP2, save_interval=1, dir=address, async_save=is_async)
        far = place(address)
        ranks(2).run(in_store, store.environment, train_between, raw, far, 2)
        assert store.names(f"runs/{name}/step_00000002/") == here
        assert store.read(f"runs/{name}/latest") == b"step_00000002\n"
        assert not any((tmp_path / "staging").iterdir())
        starts.append(far / "step_00000002")
    for count, parallel, start in ((2, EP2, starts[1]), (4, TP2 | EP2, starts[0])):
        other = run_settings(tmp_path, parallel)
        losses = [
            ranks(count).run(
                in_store, store.environment, train_between, other, tmp_path / str(count), 3, begin
            )
            for begin in (start, near / "step_00000002")
        ]
        assert len(losses[0][0]) == 1
        assert losses[0] == losses[1]


def written_run(corpus, tmp_path, store, **checkpoint):
    """A configuration of 6 steps on one rank, the run's folder, and its checkpoints' address."""
    address = f"s3://{store.bucket}/runs/one"
    raw = trainer_settings(
        corpus,
        tmp_path / "run",
        training={"train_iters": 6, "micro_batch_size": 8},
        checkpoint={"dir": address, "save_interval": 2, "keep": 2, **checkpoint},
    )
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw))
    return config, tmp_path / "run", address


def test_train_resume_and_use(corpus, tmp_path, store):
    config, run, address = written_run(corpus, tmp_path, store)
    first = succeeded(moepp("train", config))
    assert store.folders("runs/one/") == ["latest", "step_00000004", "step_00000006"]
    # Also as the run that has it.
    assert find_checkpoint(run) == find_checkpoint(address) == place(f"{address}/step_00000006")
    text_of = succeeded(moepp("generate", address, "--prompt=words"))
    assert "words" in text_of.stdout
    text = tmp_path / "text.txt"
    text.write_text("words 4 and lines; words 9 and lines")
    succeeded(moepp("score", f"{address}/step_00000004", "--text", text))
    out = tmp_path / "exported"
    succeeded(moepp("convert", "mcore-to-hf", address, out))
    assert (out / "tokenizer.json").is_file()
    # The newest is damaged: its size is right, its content is not.
    name = "runs/one/step_00000006/__0_0.distcp"
    content = bytearray(store.read(name))
    content[len(content) // 2] ^= 1
    store.write(name, bytes(content))
    second = succeeded(moepp("train", config, "--resume", "training.train_iters=8"))
    assert "step_00000006: __0_0.distcp is damaged" in second.stderr
    assert f"resumed from step 4 of {address}/step_00000004" in second.stdout
    assert logged(run, "step") == [1, 2, 3, 4, 5, 6, 7, 8]
    # Written anew, and older ones deleted.
    assert store.folders("runs/one/") == ["latest", "step_00000006", "step_00000008"]
    # Without the manifest a checkpoint is none, and the next start removes what is left of it.
    store.delete("runs/one/step_00000008/integrity.json")
    third = succeeded(
        moepp("train", config, "--resume", "training.train_iters=10", "checkpoint.keep=3")
    )
    assert f"resumed from step 6 of {address}/step_00000006" in third.stdout
    refused = moepp("train", config, "--overwrite")
    assert refused.returncode == 2
    assert "nothing can be moved in object storage" in refused.stderr
    told = "".join(done.stdout + done.stderr for done in (first, text_of, second, third, refused))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in told
    assert SECRET.encode() not in written
    assert b"key-of-the-store" not in written


@pytest.mark.parametrize("is_async", [False, True])
def test_a_connection_that_is_lost_in_a_save(corpus, tmp_path, store, is_async):
    config, run, address = written_run(corpus, tmp_path, store, async_save=is_async)
    # The tensors of step 4 are there; then nothing answers any more.
    store.stop_at("PUT", "step_00000004/", number=2)
    train_on_when_saves_fail(config, run, 6, "could not be reached")
    assert not any((run / "staging").iterdir())
    if not is_async:
        gone = moepp("train", config, "--resume")
        assert gone.returncode == 3
        assert gone.stderr.startswith("error: checkpoint.dir (s3://")
        assert gone.stderr.count("\n") == 1
    store.start()
    assert "step_00000004" in store.folders("runs/one/")
    second = succeeded(moepp("train", config, "--resume"))
    assert f"resumed from step 2 of {address}/step_00000002" in second.stdout
    assert logged(run, "step") == [1, 2, 3, 4, 5, 6]
    assert store.folders("runs/one/") == ["latest", "step_00000004", "step_00000006"]


def test_what_cannot_be_used_is_refused_at_once(corpus, tmp_path, store, monkeypatch, capsys):
    config, run, address = written_run(corpus, tmp_path, store)

    def refused(status, *overrides):
        monkeypatch.setattr(sys, "argv", ["moepp", "train", str(config), *overrides])
        with pytest.raises(SystemExit) as ended:
            main.run()
        error = capsys.readouterr().err
        assert ended.value.code == status, error
        assert error.count("\n") == 1
        assert not run.exists()
        return error

    assert f"the bucket s3://{store.missing} does not exist" in refused(
        2, f"checkpoint.dir=s3://{store.missing}/x"
    )
    assert f"checkpoint.load (s3://{store.missing}/x) must be usable" in refused(
        2, f"checkpoint.load=s3://{store.missing}/x"
    )
    assert "must be a checkpoint folder" in refused(2, f"checkpoint.load={address}/none")
    store.deny("PUT")
    assert "the credentials do not allow it (AccessDenied" in refused(2)
    store.deny()
    assert store.names() == []
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    unreachable = refused(3, "checkpoint.dir=s3://elsewhere/x")
    assert "Could not connect to the endpoint URL" in unreachable
    assert "hidden" not in unreachable
