"""The checkpoint a run starts from: the newest valid one, another run's, or its weights."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from moepp_megatron.config import ConfigError
from tests.commands import moepp
from tests.parallel.checkpoint_runs import Messages, logged, run_trainer, trainer_settings
from tests.parallel.planted_pickles import STATEFUL, plant
from tests.parallel.training_runs import EP2

AUTO = {"save_interval": 2, "load": "auto"}


@pytest.fixture(scope="module")
def trained(ranks, corpus, tmp_path_factory):
    """A run of four steps with checkpoints of steps 2 and 4, on two ranks."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    ranks(2).run(run_trainer, _settings(corpus, folder, 4, {"save_interval": 2}))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to do harm to."""
    return shutil.copytree(trained, tmp_path / "run")


def _settings(corpus, run, steps, checkpoint, **sections):
    training = {"train_iters": steps}
    # So fast that two steps show.
    optimizer = {"lr": 0.01, "warmup_iters": 0}
    return trainer_settings(
        corpus,
        run,
        training=training,
        optimizer=optimizer,
        checkpoint=checkpoint,
        parallel=EP2,
        **sections,
    )


def found(raw):
    """Return where a trainer on this rank would start, and what it would log."""
    from moepp_megatron.config import parse_config
    from moepp_megatron.training.checkpoint.read import find_start
    from moepp_megatron.training.run_folder import checkpoint_folder

    config = parse_config(raw)
    with Messages() as messages:
        return find_start(config, checkpoint_folder(config)), messages


def refusal(raw):
    """Why a trainer on this rank does not start."""
    with pytest.raises(ConfigError) as refused:
        run_trainer(raw)
    return str(refused.value)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        # More of them: tests/unit/training/test_checkpoint_find.py.
        ("__1_0.distcp", _flip, "__1_0.distcp is damaged"),
        ("metadata.json", Path.unlink, "metadata.json is missing"),
        (".metadata", _flip, ".metadata is damaged"),
        ("config.yaml", _truncate, "config.yaml has "),
    ],
)
def test_auto_skips_what_is_damaged(ranks, corpus, run, name, harm, why):
    newest = run / "checkpoints/step_00000004"
    harm(newest / name)
    left = sorted(path.name for path in newest.iterdir())
    raw = _settings(corpus, run, 4, {"load": "auto"})
    (start, messages), (same, nothing) = ranks(2).run(found, raw)
    assert start == same == run / "checkpoints/step_00000002"
    assert [line for line in messages if f"{newest}: {why}" in line], messages
    assert not nothing, "rank 0 alone warns"
    assert sorted(path.name for path in newest.iterdir()) == left


def test_a_run_continues_from_the_newest_valid_checkpoint(ranks, corpus, run):
    newest = run / "checkpoints/step_00000004"
    _flip(newest / "__1_0.distcp")
    expected = logged(run)
    # Without saving, so that step 4 stays as it is.
    messages = ranks(2).run(run_trainer, _settings(corpus, run, 4, {"load": "auto"}))
    assert logged(run) == expected
    assert [line for line in messages[0] if f"{newest}: __1_0.distcp is damaged" in line]
    assert not messages[1]


def test_auto_ignores_what_a_killed_save_left(ranks, corpus, run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_00000004", checkpoints / ".step_00000006.incomplete-ab")
    (checkpoints / "step_00000008").mkdir()
    (checkpoints / "latest").write_text("step_00000008\n")
    messages = ranks(2).run(run_trainer, _settings(corpus, run, 6, AUTO))[0]
    assert logged(run, "step") == list(range(1, 7))
    assert any("step_00000008: metadata.json is missing" in line for line in messages)
    # Read, and so kept; never complete, and so removed.
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006",
        "step_00000008",
    ]


def test_unreadable_checkpoint_of_the_same_step_is_put_aside(ranks, corpus, run):
    checkpoints = run / "checkpoints"
    _flip(checkpoints / "step_00000004/__1_0.distcp")
    damaged = (checkpoints / "step_00000004/__1_0.distcp").read_bytes()
    ranks(2).run(run_trainer, _settings(corpus, run, 4, {**AUTO, "keep": 1}))
    (aside,) = checkpoints.glob("step_00000004.unreadable-*")
    assert (aside / "__1_0.distcp").read_bytes() == damaged
    assert (checkpoints / "step_00000004").is_dir()
    assert not (checkpoints / "step_00000002").exists(), "keep deletes what is valid and old"


def test_auto_starts_from_scratch_where_there_is_nothing(ranks, corpus, tmp_path):
    messages = ranks(2).run(run_trainer, _settings(corpus, tmp_path / "new", 1, {"load": "auto"}))
    assert logged(tmp_path / "new", "step") == [1]
    assert any("starts from scratch" in line for line in messages[0])


@pytest.mark.parametrize("arguments", [["--nproc", "2"], []])
def test_resume_without_a_sound_checkpoint_is_exit_code_2(corpus, run, tmp_path, arguments):
    config = tmp_path / "config.yaml"
    raw = _settings(corpus, run, 4, {"save_interval": 2})
    config.write_text(yaml.safe_dump(raw if arguments else {**raw, "parallel": {}}))
    for step in (2, 4):
        _flip(run / "checkpoints" / f"step_{step:08d}" / "__1_0.distcp")
    done = moepp("train", "--resume", *arguments, config)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "none of 2 is: " in line
    assert "restore one of them" in line


@pytest.mark.parametrize("name", ["run", "{tmp}/run", "{tmp}/run/checkpoints/step_00000004"])
def test_names_of_another_run(ranks, corpus, run, tmp_path, name):
    raw = _settings(corpus, tmp_path / "second", 5, {"load": name.format(tmp=tmp_path)})
    newest = run / "checkpoints/step_00000004"
    assert ranks(2).run(found, raw) == [(newest, [])] * 2


def test_another_run_continues_from_a_checkpoint(ranks, corpus, run, tmp_path):
    load = {"load": str(run / "checkpoints/step_00000002")}
    ranks(2).run(run_trainer, _settings(corpus, tmp_path / "second", 5, load))
    assert logged(tmp_path / "second", "step") == [3, 4, 5]
    assert logged(tmp_path / "second")[:2] == logged(run)[2:]


def test_weights_alone_start_at_step_0(ranks, corpus, run, tmp_path):
    load = {"load": str(run), "load_optimizer": False}
    ranks(2).run(run_trainer, _settings(corpus, tmp_path / "tuned", 2, load))
    assert logged(tmp_path / "tuned", "step") == [1, 2]
    # The first batch of the data again, with weights of four steps.
    assert logged(tmp_path / "tuned")[0] < logged(run)[0] - 0.1


def test_missing_name_is_refused(ranks, corpus, tmp_path):
    raw = _settings(corpus, tmp_path / "new", 1, {"load": "nowhere"})
    for line in ranks(2).run(refusal, raw):
        assert line.startswith("checkpoint.load (nowhere) must be a checkpoint")


def test_other_shapes_are_refused(ranks, corpus, run):
    raw = _settings(corpus, run, 5, {"load": "auto"}, model={"hidden_size": 64})
    for line in ranks(2).run(refusal, raw):
        assert re.search(r"model.hidden_size \(64\) must be .* \(32\); use 32", line)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (".metadata", f".metadata asks for {Path.__module__}.Path.touch"),
        (STATEFUL, ".metadata changes what it did not make"),
        ("__0_0.distcp", "__0_0.distcp: entry common_state/shard_0_1 asks for "),
    ],
)
def test_planted_pickle_is_not_executed(ranks, corpus, run, tmp_path, name, why):
    newest, exploded = run / "checkpoints/step_00000004", tmp_path / "exploded"
    plant(newest, name, exploded)
    start, messages = ranks(2).run(found, _settings(corpus, run, 4, {"load": "auto"}))[0]
    assert any(f"{newest}: {why}" in line for line in messages), messages
    assert not exploded.exists()
    assert start == run / "checkpoints/step_00000002"
    load = {"load": str(newest), "load_optimizer": False}
    for line in ranks(2).run(refusal, _settings(corpus, run, 4, load)):
        assert re.search(f"must be a checkpoint folder .*{why}", line)
    assert not exploded.exists()
