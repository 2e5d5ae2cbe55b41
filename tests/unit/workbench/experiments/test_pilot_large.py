"""The bookkeeping of benchmarks/pilot_large.py at toy size, without training."""

from __future__ import annotations

import fcntl
import json
import math
from functools import partial
from pathlib import Path

import pytest

from benchmarks import pilot_factors, pilot_large
from benchmarks.pilot_factors import factor_runs, factors, factors_table
from benchmarks.pilot_large import Study, known_arms, open_pilot, runs_in_order, time_sessions, work
from benchmarks.pilot_table import differences, losses_of
from moepp_megatron.config import ConfigError, load_config
from moepp_megatron.runtime.launch import STOPPED, LaunchOptions
from moepp_megatron.workbench.experiments.pilot.collect import result_of
from moepp_megatron.workbench.experiments.pilot.procedure import Pilot
from moepp_megatron.workbench.experiments.pilot.result import Arm
from moepp_megatron.workbench.experiments.pilot.runs import PilotRun
from moepp_megatron.workbench.experiments.runs import Interrupted
from tests.unit.workbench.experiments.pilot.synthetic import write_run

TOY = Study(steps=20, seeds=3, eval_iters=1, sources=("one",), sessions=2)
CORPUS = {"one": {"sha256": "a" * 64}}


class Ranks:
    """Stands in for the ranks of runs and sessions; narrowed vanilla is worst."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.stops = False

    def __call__(self, options: LaunchOptions, module: str, arguments: list[str]) -> int:
        if arguments[0] == "bench":
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps({"speedup": 1.25}))
            return 0
        assert arguments[1] == "--resume"
        assert options.stoppable
        config = load_config(arguments[-1])
        assert config.checkpoint.save_interval > 0
        self.started.append(config.run.name)
        if self.stops:
            return STOPPED
        name, seed = config.run.name, config.training.seed
        loss = (
            4.0
            + 0.1 * ("wide" in name)
            - 0.2 * name.startswith("moepp")
            + 0.3 * ("percent" in name)
        )
        noise = 0.001 * ((seed * 7 + len(name)) % 5)
        arm = Arm(name=name, kind="moepp", tau=None, topk=2, steps=config.training.train_iters)
        write_run(PilotRun(name, name, config, arm, seed), loss=loss + noise)
        return 0


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    stand_in = Ranks()
    monkeypatch.setattr("moepp_megatron.workbench.experiments.runs.run_ranks", stand_in)
    monkeypatch.setattr(pilot_large, "prepare_corpus", lambda *_: CORPUS)
    return stand_in


def opened(tmp_path: Path, out: str = "out", study: Study = TOY) -> Pilot:
    return open_pilot(tmp_path / out, tmp_path / "results", study)


def never() -> bool:
    return False


def test_runs_in_their_order_and_a_fresh_folder_goes_on(tmp_path: Path, ranks: Ranks) -> None:
    assert len(runs_in_order(opened(tmp_path))) == 4 * 3
    done = work(partial(opened, tmp_path), 5, never)
    assert done == ranks.started
    assert done[:4] == [
        "vanilla-seed-1234",
        "moepp-tau-0.75-seed-1234",
        "moepp-top-3-tau-1-seed-1234",
        "vanilla-70-percent-of-the-steps-seed-1234",
    ]
    # Another machine that has only the results.
    work(partial(opened, tmp_path, "other"), 100, never)
    assert len(set(ranks.started)) == len(ranks.started) == 4 * 3 + 3
    assert ranks.started[-1].startswith("vanilla-160-wide-as-moepp-tau-0.75")
    assert work(partial(opened, tmp_path, "third"), 100, never) == []


def test_the_verdict_is_the_pilots_own(tmp_path: Path, ranks: Ranks) -> None:
    work(partial(opened, tmp_path), 100, never)
    pilot = opened(tmp_path)
    assert result_of(pilot) is None
    arms = known_arms(pilot)
    told = list(differences(losses_of(pilot, arms), arms))
    assert any("MoE++ tau 0.75 minus vanilla, 160 wide" in line for line in told)
    time_sessions(pilot, tmp_path / "results")
    whole = opened(tmp_path, "other")
    match = whole.plan.matches["MoE++ tau 0.75"]
    assert match.log_time_ratio == pytest.approx(-math.log(1.25))
    work(partial(opened, tmp_path, "other"), 100, never)
    result = result_of(opened(tmp_path, "third"))
    assert result is not None
    assert (result.setting.look, result.verdicts[0].at_pilot) == (1, "pays")
    assert result.verdicts[0].loss_in_compute.mean == pytest.approx(-0.3, abs=0.01)


def test_factors_are_compared_with_what_has_them(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = {factor.name: factor for factor in factors(opened(tmp_path))}
    assert len(named) == len(pilot_factors.FACTORS)
    both = named["gate_normalization=nonzero"]
    assert both.moepp.config.moe.gate_normalization == "nonzero"
    assert both.vanilla.config.moe.gate_normalization == "selected"
    std, scale = (named[name] for name in ("init_method_std=0.02", "expert_input_scale=2"))
    monkeypatch.setattr(
        pilot_factors,
        "FACTORS",
        [(("model.init_method_std=0.02",),) * 2, (("moe.expert_input_scale=2",), ())],
    )
    pilot = opened(tmp_path)
    assert factors(pilot) == [std, scale]
    assert scale.vanilla is not std.vanilla
    assert scale.vanilla.config == pilot.base[0].config
    assert scale.moepp.config.training == pilot.moepp[0].config.training
    work(partial(opened, tmp_path), 4 * 3, never)
    assert len(work(partial(opened, tmp_path), 100, never, factor_runs)) == 3 * 3
    table = factors_table(opened(tmp_path, "other"))
    assert list(table.columns[1].cells) == ["3"] * 3
    shown = [float(str(cell).split()[0]) for cell in table.columns[3].cells]
    assert shown == pytest.approx([-0.2] * 3, abs=0.01)


def test_what_changed_most_has_further_seeds_first(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model with "wide" in its name is worse by 0.1 (`Ranks`).
    small, large = ((f"model.init_method_std={std}",) for std in (0.02, 0.03))
    monkeypatch.setattr(pilot_factors, "FACTORS", [(small, small), (large, ())])
    monkeypatch.setattr(pilot_factors, "_title", lambda changed: {large: "wide"}.get(changed, "x"))
    work(partial(opened, tmp_path), 4 * 3, never)
    assert len(work(partial(opened, tmp_path), 3, never, factor_runs)) == 3
    table = factors_table(opened(tmp_path))
    assert list(table.columns[1].cells) == ["3", "1", "1"]
    (name,) = work(partial(opened, tmp_path), 1, never, factor_runs)
    assert name == "moepp-wide-seed-1235"


def test_a_run_that_somebody_has_is_left_to_them(tmp_path: Path, ranks: Ranks) -> None:
    pilot = opened(tmp_path)
    pilot.folder.claim(runs_in_order(pilot))
    with (tmp_path / "out/logs/vanilla-seed-1234.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert work(partial(opened, tmp_path), 1, never) == ["moepp-tau-0.75-seed-1234"]
    assert work(partial(opened, tmp_path), 1, never) == ["vanilla-seed-1234"]


def test_an_interrupted_run_leaves_no_result(tmp_path: Path, ranks: Ranks) -> None:
    ranks.stops = True
    with pytest.raises(Interrupted):
        work(partial(opened, tmp_path), 2, never)
    assert not list((tmp_path / "results").glob("vanilla*.json"))
    ranks.stops = False
    assert work(partial(opened, tmp_path), 1, never) == ["vanilla-seed-1234"]
    assert work(partial(opened, tmp_path), 9, lambda: True) == []


def test_results_of_other_settings_are_refused(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    work(partial(opened, tmp_path), 1, never)
    longer = Study(steps=24, seeds=3, eval_iters=1, sources=("one",), sessions=2)
    with pytest.raises(ConfigError, match=r"settings\.json differ"):
        opened(tmp_path, "other", longer)
    other = {"one": {"sha256": "b" * 64}}
    monkeypatch.setattr(pilot_large, "prepare_corpus", lambda *_: other)
    with pytest.raises(ConfigError, match=r"settings\.json differ"):
        opened(tmp_path, "other")
    # Also a single file that was brought from elsewhere.
    monkeypatch.setattr(pilot_large, "prepare_corpus", lambda *_: CORPUS)
    file = tmp_path / "results/vanilla-seed-1234.json"
    file.write_text(file.read_text().replace('"settings": "', '"settings": "0'))
    with pytest.raises(ConfigError, match="those of vanilla-seed-1234"):
        work(partial(opened, tmp_path), 1, never)
