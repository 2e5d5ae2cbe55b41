"""Callbacks and plugins in whole runs: what they are called with, and what their failure leaves."""

import json
import random
from unittest import mock

import numpy as np
import pytest
import yaml

from moepp_megatron import Callback, ConfigError, train
from tests.commands import module, moepp, succeeded
from tests.example_plugins import install, write_entry_points
from tests.faults.harness import short_steps, write_config
from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_of
from tests.refusals import config_error

# What an installed package has: one fails on rank 0 while the other ranks continue.
PACKAGE = """
from moepp_megatron import Callback


class Failing(Callback):
    def after_step(self, run, record):
        if run.step == 3 and run.rank == 0:
            raise OSError("no room\\nleft")

    def failed(self, run, error):
        (run.folder / f"told{run.rank}").write_text(f"{run.step} {type(error).__name__}")


class AlsoFailing(Callback):
    def failed(self, run, error):
        raise KeyError("in the handler")


def nothing():
    return {}
"""
ONE = "parallel.expert_model_parallel_size=1"
NAMES = {
    "failing": "told_callbacks:Failing",
    "also_failing": "told_callbacks:AlsoFailing",
    "nothing": "told_callbacks:nothing",
}


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    folder = tmp_path / "installed"
    folder.mkdir()
    install(folder)
    (folder / "told_callbacks.py").write_text(PACKAGE)
    write_entry_points(folder, {"moepp_megatron.callbacks": NAMES}, "told")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    return folder


@pytest.fixture
def config(tmp_path, corpus):
    """Four steps on two ranks with random noise, saved after the second and the fourth."""
    return write_config(
        tmp_path / "c.yaml",
        corpus,
        tmp_path / "run",
        2,
        save_interval=2,
        sections={"moe": {"input_jitter_eps": 0.1}, "checkpoint": {"async_save": False}},
        train_iters=4,
        eval_interval=4,
        eval_iters=1,
        log_interval=2,
        **short_steps(2),
    )


def settings_of(config, run):
    return {**yaml.safe_load(config.read_text()), "run": {"dir": str(run)}}


class Recorder(Callback):
    """Notes its calls, and disturbs what it may disturb."""

    def __init__(self, stops=None):
        self.told = []
        self.stops = stops

    def note(self, run, *what):
        import torch

        random.random(), np.random.rand(), torch.rand(3)
        self.told.append((run.step, *what))

    def begin(self, run):
        self.note(run, "start", run.world_size, len(run.models))

    def after_step(self, run, record):
        if record is not None and record.valid_loss is not None:
            self.note(run, "evaluation")
        self.note(run, "step", None if record is None else record.loss)
        if run.step == self.stops and run.rank == 1:
            run.stop()

    def saved(self, run, checkpoint):
        self.note(run, "save", checkpoint.name, (checkpoint / "integrity.json").is_file())

    def end(self, run):
        self.note(run, "end")


def told(raw, stops=None):
    """Return the events that a callback got, and whether the run was stopped."""
    recorder = Recorder(stops)
    trainer = trainer_of(raw, [recorder])
    trainer.run()
    return recorder.told, trainer.stopped


def test_what_callbacks_are_told(ranks, config, tmp_path):
    ranks(2).run(run_trainer, settings_of(config, tmp_path / "plain"))
    expected = logged(tmp_path / "plain")
    zero, one = ranks(2).run(told, settings_of(config, tmp_path / "run"))
    # Their random numbers are their own.
    assert logged(tmp_path / "run") == expected
    lines = [
        (0, "start", 2, 1),
        (1, "step", None),
        (2, "step", expected[0]),
        (2, "save", "step_00000002", True),
        (3, "step", None),
        (4, "evaluation"),
        (4, "step", expected[1]),
        (4, "save", "step_00000004", True),
        (4, "end"),
    ]
    assert zero == one == (lines, False)


def test_one_rank_may_ask_to_stop(ranks, config, tmp_path):
    for lines, stopped in ranks(2).run(told, settings_of(config, tmp_path / "run"), stops=2):
        assert lines[-2:] == [(2, "save", "step_00000002", True), (2, "end")]
        assert stopped


def test_a_callback_that_raises(config, plugins, tmp_path):
    """On one rank, while the other moves on to the next step and waits there."""
    names = "run.callbacks=[also_failing, failing]"
    failed = moepp("train", config, names, "--nproc", 2)
    assert failed.returncode == 1
    assert (
        "CallbackError: callback failing failed in after_step after step 3: OSError: no room"
        in failed.stderr
    )
    assert "callback also_failing failed in failed" in failed.stderr
    assert (tmp_path / "run/told0").read_text() == "3 CallbackError"
    went_on = succeeded(moepp("train", config, "--resume", ONE))
    assert "resumed from step 2" in went_on.stdout
    assert logged(tmp_path / "run", "step") == [2, 4]


class Leaving(Callback):
    """Ends the process as a script does."""

    def begin(self, run):
        raise SystemExit(0)


class Demanding(Callback):
    def __init__(self, folder):
        pass


def refusals(raw):
    """Return the messages about callbacks that cannot be called or would end a rank silently."""
    from moepp_megatron.features.callbacks import part as callbacks
    from moepp_megatron.features.callbacks.part import _RENAMED, CallbackError, CallbacksPart

    trainer = trainer_of(raw, [Leaving()])
    with pytest.raises(CallbackError) as left:
        trainer.run()
    config = trainer.config
    renamed = []
    for method in _RENAMED:
        old = type("Old", (Callback,), {method: print})()
        with pytest.raises(ConfigError) as refused:
            CallbacksPart(config, trainer.model, trainer.supervisor, [old])
        renamed.append(str(refused.value))
    named = config.model_copy(update={"run": config.run.model_copy(update={"callbacks": ["x"]})})
    with (
        mock.patch.object(callbacks, "load_plugin", return_value=Demanding),
        pytest.raises(CallbackError) as demanding,
    ):
        CallbacksPart(named, trainer.model, trainer.supervisor)
    return [str(left.value), str(demanding.value), *renamed]


def test_what_a_callback_may_not_be(on_one_rank, config, tmp_path):
    raw = settings_of(config, tmp_path / "run")
    left, demanding, *renamed = on_one_rank(refusals, raw | {"parallel": {}})
    assert left == "callback Leaving failed in begin after step 0: SystemExit: 0"
    nothing_calls = (
        "callback Old (Old) must have no method {}, which nothing calls any more; use {}"
    )
    assert renamed == [
        nothing_calls.format(*names)
        for names in (
            ("on_start", "begin"),
            ("on_step", "after_step"),
            ("on_evaluation", "after_step, whose record has valid_loss and task_score"),
            ("on_save", "saved"),
            ("on_exception", "failed"),
            ("on_end", "end"),
        )
    ]
    assert demanding.startswith("callback x could not be made: TypeError: Demanding.__init__()")


def test_what_is_no_callback(config, plugins):
    done = moepp("train", config, ONE, "run.callbacks=[nothing]")
    assert done.returncode == 2
    assert (
        "error: callback nothing (dict) must be a Callback; give an object of a class derived from "
        "moepp_megatron.Callback, or such a class as the entry point" in done.stderr
    )
    done = moepp("train", config, ONE, "run.callbacks=[plugin:noting]", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.endswith("use nothing\n")


def test_the_example_package(config, plugins, tmp_path):
    names = (
        "optimizer.kind=adam_l2",
        "optimizer.decay_style=inverse_root",
        "data.dataset=one_batch",
        "observe.sinks=[csv]",
        "run.callbacks=[patience]",
        "run.parts=[mean_loss]",
    )
    steps = ("training.eval_interval=1", "training.log_interval=1")
    done = moepp("train", config, ONE, *names, *steps, "optimizer.warmup_iters=2")
    assert done.returncode in (0, 75), done.stderr
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [record["lr"] for record in records]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-3 * (2 / 3) ** 0.5, 1e-3 * (2 / 4) ** 0.5])
    rows = [line.split(",") for line in (run / "losses.csv").read_text().splitlines()]
    assert [(int(step), float(loss)) for step, loss in rows] == [
        (record["step"], record["loss"]) for record in records
    ]
    assert [record["mean_loss"] for record in records] == pytest.approx(
        [np.mean([other["loss"] for other in records[: n + 1]]) for n in range(len(records))]
    )
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["optimizer"]["kind"] == "plugin:adam_l2"
    from moepp_megatron.tools.report.page import build_report

    # The run's report needs no plugin: this process has none.
    build_report(run)


def given(raw, folder):
    """Return the calls of a plugin's part and its count of steps; it rolls back after step 3."""
    import sys

    from moepp_megatron.training.part import Rollback

    sys.path.insert(0, str(folder))
    import moepp_example_plugins as plugins

    found = []

    class Restless(plugins.MeanLoss):
        def load(self, state, why, step):
            found.append((why, step, state.get("steps")))
            return super().load(state, why, step)

        def judge(self, step):
            found.append((step.number, self.steps))
            if step.number == 3 and sum(each[0] == "rollback" for each in found) == 0:
                yield Rollback(None, lambda _: ())

    raw["run"]["parts"] = ["mean_loss"]
    with mock.patch.object(plugins, "MeanLoss", Restless):
        trainer_of(raw).run()
    return found


def test_a_plugin_brings_a_part(ranks, on_one_rank, config, tmp_path):
    """With a state that a rollback and a resume restore."""
    folder = tmp_path / "installed"
    folder.mkdir()
    install(folder)
    raw = settings_of(config, tmp_path / "run") | {"parallel": {}}
    found = on_one_rank(given, raw, folder)
    back = ("rollback", 3, 2)
    assert found == [("resume", 0, None), (1, 1), (2, 2), (3, 3), back, (3, 3), (4, 4)]
    raw["checkpoint"]["load"] = "auto"
    raw["training"]["train_iters"] = 5
    assert ranks(1).run(given, raw, folder) == [[("resume", 4, 4), (5, 5)]]


def test_what_is_no_part(config, plugins):
    write_entry_points(plugins, {"moepp_megatron.parts": {"none": NAMES["nothing"]}}, "none")
    done = moepp("train", config, ONE, "run.parts=[none]")
    assert done.returncode == 2
    assert (
        "error: run.parts (plugin:none) must be a class derived from moepp_megatron.training.part."
        "Part, and is <function nothing" in done.stderr
    )


def test_callbacks_of_a_program(config, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "import moepp_megatron as moepp\n"
        "class Steps(moepp.Callback):\n"
        "    def after_step(self, run, record):\n"
        "        print('told', run.rank, run.step, flush=True)\n"
        "moepp.train(sys.argv[1], 'training.train_iters=1', callbacks=[Steps()])\n"
    )
    done = succeeded(
        module(
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            program,
            config,
            cwd=tmp_path,
        )
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("told")]
    assert sorted(said) == ["told 0 1", "told 1 1"]


def test_objects_are_not_handed_to_other_processes(config):
    with config_error(r"^nproc \(2\) must be 1 with callbacks"):
        train(config, nproc=2, callbacks=[Callback()])
