"""Callbacks and plugins in whole runs: what they are told, and what their failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moepp_megatron import Callback, ConfigError, train
from tests.commands import module, moepp
from tests.example_plugins import install, write_entry_points
from tests.faults.harness import write_config

# Writes what it is told to a file for each rank, and disturbs what it may disturb.
RECORDER = """
import random
import numpy
import torch
from moepp_megatron import Callback


class Recorder(Callback):
    def note(self, run, *words):
        random.random(), numpy.random.rand(), torch.rand(3)
        with (run.folder / f"told{run.rank}").open("a") as file:
            print(run.step, *words, file=file)

    def on_start(self, run):
        self.note(run, "start", run.world_size, len(run.models))

    def on_step(self, run, metrics):
        self.note(run, "step", None if metrics is None else metrics.loss)
        if run.step in self.fails:
            raise OSError("no room\\nleft")
        if run.step == self.stops and run.rank == 1:
            run.stop()

    def on_evaluation(self, run, results):
        self.note(run, "evaluation", *results)

    def on_save(self, run, checkpoint):
        self.note(run, "save", checkpoint.name, (checkpoint / "integrity.json").is_file())

    def on_exception(self, run, error):
        self.note(run, "exception", type(error).__name__)

    def on_end(self, run):
        self.note(run, "end")

    fails, stops = (), None


class Failing(Recorder):
    fails = (3,)


class Stopping(Recorder):
    stops = 2


class AlsoFailing(Callback):
    def on_exception(self, run, error):
        raise KeyError("in the handler")


def nothing():
    return {}
"""
ONE = "parallel.expert_model_parallel_size=1"
NAMES = {
    "recorder": "told_callbacks:Recorder",
    "failing": "told_callbacks:Failing",
    "stopping": "told_callbacks:Stopping",
    "also_failing": "told_callbacks:AlsoFailing",
    "nothing": "told_callbacks:nothing",
}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "installed"
    folder.mkdir()
    install(folder)
    (folder / "told_callbacks.py").write_text(RECORDER)
    write_entry_points(folder, {"moepp_megatron.callbacks": NAMES}, "told")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """Four steps on two ranks with random noise, saved after the second and the fourth."""
    path = write_config(
        tmp_path / "c.yaml", corpus, tmp_path / "run", 2, save_interval=2, train_iters=4,
        eval_interval=4, eval_iters=1, log_interval=2,
    )  # fmt: skip
    content = yaml.safe_load(path.read_text())
    content["moe"]["input_jitter_eps"] = 0.1
    content["checkpoint"]["async_save"] = False
    path.write_text(yaml.safe_dump(content))
    return path


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def told(run: Path, rank: int) -> list[list[str]]:
    return [line.split() for line in (run / f"told{rank}").read_text().splitlines()]


def test_what_callbacks_are_told(config: Path, plugins: Path, tmp_path: Path) -> None:
    plain = moepp("train", config, f"run.dir={tmp_path / 'plain'}", "--nproc", 2)
    assert plain.returncode == 0, plain.stderr
    done = moepp("train", config, "run.callbacks=[recorder]", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    expected = losses(tmp_path / "plain")
    # Their random numbers are their own.
    assert losses(tmp_path / "run") == expected
    lines = [
        ["0", "start", "2", "1"],
        ["1", "step", "None"],
        ["2", "step", str(expected[0])],
        ["2", "save", "step_00000002", "True"],
        ["3", "step", "None"],
        ["4", "evaluation", "valid_loss"],
        ["4", "step", str(expected[1])],
        ["4", "save", "step_00000004", "True"],
        ["4", "end"],
    ]
    assert told(tmp_path / "run", 0) == told(tmp_path / "run", 1) == lines


def test_a_callback_that_raises(config: Path, plugins: Path, tmp_path: Path) -> None:
    plain = moepp("train", config, f"run.dir={tmp_path / 'plain'}", "--nproc", 2)
    assert plain.returncode == 0, plain.stderr
    names = "run.callbacks=[also_failing, failing]"
    failed = moepp("train", config, names, "--nproc", 2)
    assert failed.returncode == 1
    assert (
        "CallbackError: callback failing failed in on_step after step 3: OSError: no room"
        in failed.stderr
    )
    assert "callback also_failing failed in on_exception" in failed.stderr
    ends = told(tmp_path / "run", 0)[-2:]
    assert [line[1] for line in ends] == ["step", "exception"]
    assert ends[-1] == ["3", "exception", "CallbackError"]
    went_on = moepp("train", config, "--resume", "--nproc", 2)
    assert went_on.returncode == 0, went_on.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_one_rank_may_ask_to_stop(config: Path, plugins: Path, tmp_path: Path) -> None:
    done = moepp("train", config, "run.callbacks=[stopping]", "--nproc", 2)
    assert done.returncode == 75, done.stderr
    ends = [["2", "save", "step_00000002", "True"], ["2", "end"]]
    assert [told(tmp_path / "run", rank)[-2:] for rank in (0, 1)] == [ends, ends]


def test_what_is_no_callback(config: Path, plugins: Path) -> None:
    done = moepp("train", config, ONE, "run.callbacks=[nothing]")
    assert done.returncode == 2
    assert (
        "error: callback nothing (dict) must be a Callback; derive its class from "
        "moepp_megatron.Callback, which an entry point names" in done.stderr
    )
    done = moepp("train", config, ONE, "run.callbacks=[plugin:recoder]", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.endswith("use recorder\n")


def test_the_example_package(
    config: Path, plugins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "optimizer.kind=adam_l2", "optimizer.decay_style=inverse_root", "data.dataset=one_batch",
        "observe.sinks=[csv]", "run.callbacks=[patience]",
    )  # fmt: skip
    steps = ("training.train_iters=8", "training.eval_interval=1", "training.log_interval=1")
    done = moepp("train", config, ONE, *names, *steps, "optimizer.warmup_iters=2")
    assert done.returncode in (0, 75), done.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records]
    assert rates[:4] == pytest.approx([5e-4, 1e-3, 1e-3 * (2 / 3) ** 0.5, 1e-3 * (2 / 4) ** 0.5])
    rows = [line.split(",") for line in (run / "losses.csv").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in rows] == [
        (record["step"], record["loss"]) for record in records
    ]
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["optimizer"]["kind"] == "plugin:adam_l2"
    # The run's report needs no plugin.
    monkeypatch.setenv("PYTHONPATH", "")
    done = moepp("report", run)
    assert done.returncode == 0, done.stderr


def test_callbacks_of_a_program(config: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "import moepp_megatron as moepp\n"
        "class Steps(moepp.Callback):\n"
        "    def on_step(self, run, metrics):\n"
        "        print('told', run.rank, run.step, flush=True)\n"
        "moepp.train(sys.argv[1], 'training.train_iters=2', callbacks=[Steps()])\n"
    )
    done = module(
        "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, config, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("told")]
    assert sorted(said) == ["told 0 1", "told 0 2", "told 1 1", "told 1 2"]


def test_objects_are_not_handed_to_other_processes(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"^nproc \(2\) must be 1 with callbacks"):
        train(config, nproc=2, callbacks=[Callback()])
