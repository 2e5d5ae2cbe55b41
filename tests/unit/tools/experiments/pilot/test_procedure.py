"""The order of a pilot's runs, and what is fixed once MoE++ was timed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import ConfigError, load_config, with_overrides
from moepp_megatron.runtime.launch import LaunchOptions
from moepp_megatron.tools.experiments.pilot.arms import build_arms
from moepp_megatron.tools.experiments.pilot.collect import result_of
from moepp_megatron.tools.experiments.pilot.plan import PilotPlan
from moepp_megatron.tools.experiments.pilot.procedure import Pilot
from moepp_megatron.tools.experiments.pilot.result import Arm, ArmKind
from moepp_megatron.tools.experiments.pilot.trials import PilotRun, Session, claim
from moepp_megatron.tools.experiments.runner import run_missing
from tests.unit.tools.experiments.pilot.synthetic import config_of, write_run

SPEEDUPS = (1.248, 1.25, 1.252)
SPEEDUP = math.prod(SPEEDUPS) ** (1 / 3)
# Of MoE++; vanilla takes 0.5 s.
STEP_S = 0.4
LOSSES = {"vanilla": 4.0, "short": 4.3, "moepp": 4.05}
LOSSES |= {"equal_time": 3.9, "narrow": 4.2}
# By a part of the name, the first that is found.
KINDS: dict[str, ArmKind] = {
    "time": "equal_time",
    "wide": "narrow",
    "percent": "short",
    "moepp": "moepp",
    "vanilla": "vanilla",
}


def pilot_in(path: Path, seeds: int, first: int = 3) -> Pilot:
    config, plan = config_of(), PilotPlan(first=first, sessions=3)
    seeds_ = range(7, 7 + seeds)
    pilot = Pilot(path, 1, config, build_arms(config, 8), seeds_, plan, "moepp pilot")
    claim(path, pilot.runs)
    return replace(pilot, plan=PilotPlan.claim(path, plan))


class Ranks:
    """Stands in for the ranks of training runs and sessions."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.step_s = STEP_S

    def __call__(self, options: LaunchOptions, module: str, arguments: list[str]) -> int:
        if arguments[0] == "bench":
            file = Path(arguments[arguments.index("--json") + 1])
            file.write_text(json.dumps({"speedup": SPEEDUPS[int(file.stem[-1]) - 1]}))
            self.started.append(file.stem)
            return 0
        config = load_config(arguments[-1])
        name = config.run.name
        self.started.append(name)
        kind = next(kind for part, kind in KINDS.items() if part in name)
        noise = 0.001 * ((config.training.seed * 7 + len(name)) % 5)
        arm = Arm(name=name, kind=kind, steps=config.training.train_iters)
        run = PilotRun(Path(), name, name, 1, arm, config.training.seed, config)
        step_s = self.step_s if "moepp" in name else 0.5
        write_run(run, loss=LOSSES[kind] + 0.1 * run.seed + noise, step_time_s=step_s)
        return 0


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    stand_in = Ranks()
    monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", stand_in)
    return stand_in


def test_arms_then_speed_then_matching_arms(tmp_path: Path, ranks: Ranks) -> None:
    whole = pilot_in(tmp_path, 3).run(lambda line: None, lambda pilot: None)
    kinds = [
        "session" if "session" in name else name.rpartition("-seed")[0] for name in ranks.started
    ]
    assert kinds[9:12] == ["session"] * 3
    assert set(kinds[12:]) == {"moepp-vanillas-time", "vanilla-32-wide"}
    assert len(kinds) == 3 * 3 + 3 + 2 * 3
    match = whole.plan.match
    assert match.log_time_ratio == pytest.approx(-math.log(SPEEDUP))
    assert match.steps == round(8 * SPEEDUP)
    # The records' share of 0.6, of 48 channels in units of 16.
    assert (match.ffn_share, match.width) == (pytest.approx(0.6), 32)
    result = result_of(whole)
    assert (result.setting.look, result.setting.next_seeds) == (1, 6)
    assert [arm.arm.kind for arm in result.arms] == [
        *("vanilla", "moepp", "short", "equal_time", "narrow")
    ]
    verdict = result.verdict
    assert (verdict.answer, verdict.speeds_agree) == ("pays", True)
    assert verdict.speed.mean == pytest.approx(1 / SPEEDUP)
    assert verdict.speed_in_runs.mean == pytest.approx(STEP_S / 0.5)


def test_nothing_is_decided_where_the_runs_show_another_speed_than_the_sessions(tmp_path, ranks):
    ranks.step_s *= 1.015
    whole = pilot_in(tmp_path, 3).run(lambda line: None, lambda pilot: None)
    result = result_of(whole)
    assert (result.verdict.answer, result.verdict.speeds_agree) == ("undecided", False)
    assert result.sentence.startswith("Undecided: a MoE++ step takes 0.812 of vanilla's time")


def test_nothing_is_known_before_moepp_was_timed(tmp_path: Path, ranks: Ranks) -> None:
    pilot = pilot_in(tmp_path, 3)
    assert pilot.sessions() == []
    run_missing(pilot.runs)
    assert len(pilot.sessions()) == 3
    assert result_of(pilot) is None


def test_more_seeds_keep_what_was_fixed_and_wait_for_the_next_look(tmp_path, ranks) -> None:
    pilot_in(tmp_path, 3).run(lambda line: None, lambda pilot: None)
    before = (tmp_path / "plan.json").read_bytes()
    ranks.started.clear()
    more = pilot_in(tmp_path, 4).run(lambda line: None, lambda pilot: None)
    assert len(ranks.started) == 5, "every arm with the new seed; no session"
    assert (tmp_path / "plan.json").read_bytes() == before
    result = result_of(more)
    assert result is not None
    # The fourth seed counts at the look of six.
    assert result.arms[0].seeds == [7, 8, 9]
    again = pilot_in(tmp_path, 6).run(lambda line: None, lambda pilot: None)
    result = result_of(again)
    assert result.arms[0].seeds == [7, 8, 9, 10, 11, 12]
    assert (result.setting.look, result.setting.level) == (2, pytest.approx(0.025 / 4))


def test_the_plan_is_that_of_the_beginning(tmp_path: Path) -> None:
    pilot_in(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"--sessions \(4\) must be as at the beginning \(3\)"):
        PilotPlan.claim(tmp_path, PilotPlan(first=3, sessions=4))
    assert PilotPlan.claim(tmp_path, PilotPlan(first=9, sessions=3)).first == 3
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="must hold a readable plan.json"):
        PilotPlan.claim(tmp_path, PilotPlan(first=3, sessions=3))


@pytest.mark.parametrize("budget", [{}, {"target_ffn_per_token": 1.0, "controller": "tau"}])
def test_sessions_hold_the_share_that_the_runs_had(tmp_path: Path, budget: dict[str, Any]) -> None:
    config = config_of(budget={**budget, "ramp_steps": 5} if budget else {})
    arm = build_arms(config, 8)[1]
    words = Session.of(tmp_path, 1, arm, 0.6, 1).command
    held = with_overrides(arm.config, words[3 : words.index("--rounds")]).moe
    assert held.ffn_share == pytest.approx(0.6, rel=1e-4)
    assert not held.budget.acts
