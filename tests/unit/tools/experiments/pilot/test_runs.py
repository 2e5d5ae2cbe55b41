"""The runs that are kept, done again and refused."""

import signal
from pathlib import Path

import pytest

from moepp_megatron.config import load_config, with_overrides
from moepp_megatron.config.exit_codes import STOPPED
from moepp_megatron.tools.experiments import runner
from moepp_megatron.tools.experiments.pilot.arms import first_arms
from moepp_megatron.tools.experiments.runner import (
    Interrupted,
    RunFailed,
    missing,
    run_missing,
    run_trial,
)
from tests.refusals import config_error
from tests.unit.tools.experiments.pilot.synthetic import config_of, pilot_in, run_in, write_run


def runs_in(path, steps=8, seeds=(7, 8), nproc=1):
    arms = first_arms(config_of(), steps)
    return [run_in(path, arm, seed, nproc) for seed in seeds for arm in arms]


class Ranks:
    """Stands in for the ranks of these runs; notes which were started."""

    def __init__(self, runs, status=0, after=0):
        self.runs = {run.name: run for run in runs}
        self.started = []
        self.status, self.after = status, after

    def __call__(self, options, module, arguments):
        file = Path(arguments[-1])
        assert file.exists(), "written before it is run"
        run = self.runs[file.stem]
        assert not run.config.run.dir.exists(), "done anew, from nothing"
        self.started.append(run.name)
        if len(self.started) > self.after and self.status:
            return self.status
        write_run(run.config)
        return 0


@pytest.fixture
def stand_in(monkeypatch):
    """Puts `Ranks` in place of those that would be started."""

    def put(runs, status=0, after=0):
        ranks = Ranks(runs, status, after)
        monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", ranks)
        return ranks

    return put


def test_configurations_are_files_that_train_takes(tmp_path):
    runs = runs_in(tmp_path)
    pilot_in(tmp_path, 2)
    for run in runs:
        assert load_config(tmp_path / "configs" / f"{run.name}.yaml") == run.config
        assert run.config.training.seed == run.seed
        assert run.config.run.dir == tmp_path / "runs" / run.name


def test_finished_runs_stay_and_an_interrupted_one_is_done_anew(tmp_path, stand_in):
    runs = runs_in(tmp_path)
    pilot_in(tmp_path, 2)
    write_run(runs[0].config)
    write_run(runs[1].config, steps=5)
    # All steps, but ended before its validation.
    write_run(runs[2].config, loss=None)
    assert missing(runs[:3]) == runs[1:3]
    ranks = stand_in(runs)
    shown = []
    run_missing(runs, shown.append)
    assert ranks.started == [run.name for run in runs[1:]]
    assert shown[:2] == ["seed 7, MoE++", "seed 7, vanilla, 70% of the steps"]
    again = stand_in(runs)
    run_missing(runs)
    assert again.started == []


def test_what_another_command_has_just_finished_stays(tmp_path, stand_in, monkeypatch):
    runs = runs_in(tmp_path, seeds=(7,))
    pilot_in(tmp_path, 2)
    ranks = stand_in(runs)
    monkeypatch.setattr(runner, "lock", lambda descriptor: write_run(runs[0].config) or True)
    run_missing(runs)
    assert ranks.started == [run.name for run in runs[1:]]


def test_other_settings_are_refused(tmp_path):
    pilot_in(tmp_path, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    with config_error(r"training.train_iters \(8, now 16\).* another folder"):
        pilot_in(tmp_path, 2, steps=16)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_a_moved_folder_is_the_same_pilot(tmp_path):
    pilot_in(tmp_path / "before", 2)
    for run in runs_in(tmp_path / "before"):
        write_run(run.config)
    (tmp_path / "before").rename(tmp_path / "after")
    assert missing(pilot_in(tmp_path / "after", 2).first_runs) == []


@pytest.mark.parametrize("status", [STOPPED, 128 + signal.SIGTERM, 128 + signal.SIGINT])
def test_a_request_to_stop_ends_the_pilot_and_keeps_what_is_done(tmp_path, stand_in, status):
    runs = runs_in(tmp_path)
    pilot_in(tmp_path, 2)
    stand_in(runs, status, after=2)
    with pytest.raises(Interrupted, match="run again to continue"):
        run_missing(runs)
    assert missing(runs[:3]) == runs[2:3]


def test_a_request_between_two_runs(tmp_path, stand_in):
    runs = runs_in(tmp_path)
    pilot_in(tmp_path, 2)
    before = signal.getsignal(signal.SIGTERM)
    stand_in(runs)
    with pytest.raises(Interrupted):
        run_missing(runs, lambda title: "++" in title and signal.raise_signal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is before
    assert runs[0] not in missing(runs)


def test_a_failed_run_says_what_to_read(tmp_path, stand_in):
    runs = runs_in(tmp_path)
    pilot_in(tmp_path, 2)
    runs[0].log.write_text("error: something (3) must be 4\n")
    stand_in(runs, status=1)
    with pytest.raises(RunFailed, match=r"vanilla-seed-7 failed: something \(3\) must.*\.log"):
        run_missing(runs)


def test_a_diverged_run_has_no_loss_to_compare(tmp_path):
    run = runs_in(tmp_path)[0]
    write_run(run.config, loss=4.0)
    file = run.config.run.dir / "metrics.jsonl"
    file.write_text(file.read_text().replace('"valid_loss":4.0', '"valid_loss":1e999'))
    with pytest.raises(RunFailed, match="vanilla-seed-7 has diverged"):
        run.result()


def test_ranks_are_started_on_the_runs_own_file(tmp_path, monkeypatch):
    calls = []

    def launched(options, module, arguments):
        calls.append((options, module, arguments))
        write_run(run.config)
        return 0

    run = runs_in(tmp_path, nproc=4)[0]
    monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", launched)
    run_trial(run)
    options, module, arguments = calls[0]
    assert (options.num_local_ranks, options.output) == (4, run.log)
    assert module == "moepp_megatron.cli.main"
    assert arguments == ["train", str(tmp_path / "configs/vanilla-seed-7.yaml")]


def test_settings_of_place_alone_may_differ(tmp_path):
    pilot_in(tmp_path, 2)
    pilot_in(tmp_path, 2, with_overrides(config_of(), ["slurm.partition=fast", "run.name=other"]))
