"""A pilot from its arms to its answer and page, without training."""

import html
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moepp_megatron.config import load_config, with_overrides
from moepp_megatron.tools.experiments.pilot.arms import first_arms, session
from moepp_megatron.tools.experiments.pilot.page import print_pilot, write_pilot_page
from moepp_megatron.tools.experiments.pilot.pilot import result_of
from moepp_megatron.tools.experiments.runner import run_missing
from moepp_megatron.tools.experiments.timed_step import BothSteps
from tests.unit.tools.experiments.pilot.synthetic import config_of, pilot_in, run_in, write_run

SPEEDUPS = (1.248, 1.249, 1.25, 1.251, 1.252)
SPEEDUP = math.prod(SPEEDUPS) ** (1 / 5)
# Of MoE++; vanilla takes 0.5 s.
STEP_S = 0.4
LOSSES = {"vanilla": 4.0, "short": 4.3, "moepp": 4.05, "equal_time": 3.9, "narrow": 4.2}
# By a part of the name, the first that is found.
KINDS = {
    "time": "equal_time",
    "wide": "narrow",
    "percent": "short",
    "moepp": "moepp",
    "vanilla": "vanilla",
}


def result(path, seeds):
    """The result of a pilot with this many seeds, run as far as it is not finished."""
    found = result_of(pilot_in(path, seeds).run(lambda title: None))
    assert found is not None
    return found[0]


class Ranks:
    """Stands in for the ranks of training runs and sessions."""

    def __init__(self):
        self.started = []
        self.step_s = STEP_S

    def __call__(self, options, module, arguments):
        if arguments[0] == "bench":
            file = Path(arguments[arguments.index("--json") + 1])
            numbers = dict.fromkeys(BothSteps.model_fields, 1.0)
            file.write_text(json.dumps(numbers | {"speedup": SPEEDUPS[int(file.stem[-1]) - 1]}))
            self.started.append(file.stem)
            return 0
        config = load_config(arguments[-1])
        name, seed = config.run.name, config.training.seed
        self.started.append(name)
        kind = next(kind for part, kind in KINDS.items() if part in name)
        loss = LOSSES[kind] + 0.1 * seed + 0.001 * ((seed * 7 + len(name)) % 5)
        write_run(config, loss=loss, step_time_s=self.step_s if "moepp" in name else 0.5)
        return 0


@pytest.fixture
def ranks(monkeypatch):
    stand_in = Ranks()
    monkeypatch.setattr("moepp_megatron.tools.experiments.runner.run_ranks", stand_in)
    return stand_in


def test_arms_then_speed_then_matching_arms(tmp_path, ranks):
    found = result(tmp_path, 5)
    kinds = [
        "session" if "session" in name else name.rpartition("-seed")[0] for name in ranks.started
    ]
    assert kinds[15:20] == ["session"] * 5
    assert set(kinds[20:]) == {"moepp-vanillas-time", "vanilla-32-wide"}
    assert len(kinds) == 3 * 5 + 5 + 2 * 5
    # The records' share of 0.6 is 32 of 48 channels, in units of 16.
    assert found.arms[3].steps == round(8 * SPEEDUP)
    assert (found.look, found.next_seeds) == (1, 10)
    assert [arm.kind for arm in found.arms] == [
        *("vanilla", "moepp", "short", "equal_time", "narrow")
    ]
    assert (found.verdict.answer, found.verdict.speeds_agree) == ("pays", True)
    assert found.verdict.speed.mean == pytest.approx(1 / SPEEDUP)
    assert found.verdict.speed_in_runs.mean == pytest.approx(STEP_S / 0.5)
    assert (found.arms[0].loss_difference, found.arms[0].time_ratio) == (None, None)
    # Seeds differ by far more than arms do, which pairs do not see.
    assert found.arms[1].time_ratio.high == pytest.approx(STEP_S / 0.5)
    assert found.arms[1].loss_difference.mean == pytest.approx(0.05, abs=0.002)


def test_nothing_is_decided_where_the_runs_show_another_speed_than_the_sessions(tmp_path, ranks):
    ranks.step_s *= 1.015
    found = result(tmp_path, 5)
    assert (found.verdict.answer, found.verdict.speeds_agree) == ("undecided", False)
    assert found.sentence.startswith("Undecided: a MoE++ step takes 0.812 of vanilla's time")


def test_nothing_is_known_before_moepp_was_timed(tmp_path, ranks):
    pilot = pilot_in(tmp_path, 3)
    assert pilot.sessions == []
    run_missing(pilot.runs)
    assert len(replace(pilot).sessions) == 5
    assert result_of(replace(pilot)) is None


def test_more_seeds_keep_what_was_fixed_and_wait_for_the_next_look(tmp_path, ranks):
    assert result(tmp_path, 3).look == 0
    ranks.started.clear()
    result(tmp_path, 5)
    assert len(ranks.started) == 10, "every arm with the new seeds; no session"
    ranks.started.clear()
    # The sixth seed counts at the look of ten.
    assert result(tmp_path, 6).seeds == [7, 8, 9, 10, 11]
    assert len(ranks.started) == 5, "every arm with the new seed; no session"
    found = result(tmp_path, 10)
    assert found.seeds == [*range(7, 17)]
    assert (found.look, found.level) == (2, pytest.approx(0.025 / 4))


@pytest.mark.parametrize("budget", [{}, {"target_ffn_per_token": 1.0, "controller": "tau"}])
def test_sessions_hold_the_share_that_the_runs_had(tmp_path, budget):
    config = config_of(budget={**budget, "ramp_steps": 5} if budget else {})
    run = run_in(tmp_path, first_arms(config, 8)[1])
    words = session(run, 0.6, 1).command
    held = with_overrides(run.config, words[3 : words.index("--rounds")]).moe
    assert held.ffn_share == pytest.approx(0.6, rel=1e-4)
    assert not held.budget.acts


EVIL = "<script>alert('1')</script> & $\\frac{1}$ [red]\u00e9"


def test_numbers_are_on_the_page_and_in_the_terminal(tmp_path, ranks, capsys):
    found, runs = result_of(pilot_in(tmp_path, 3).run(lambda title: None))
    arm = replace(found.arms[1], name=EVIL)
    found = replace(found, command=EVIL, arms=[found.arms[0], arm, *found.arms[2:]])
    page = write_pilot_page(found, runs, tmp_path / "pilot.html").read_text(encoding="ascii")
    assert "<script" not in page
    assert page.count("data:image/svg+xml") == 1
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
    print_pilot(found)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    numbers = [f"{n:+.4f}" for n in vars(arm.loss_difference).values()]
    row = f"8 {arm.valid_loss.mean:.4f} {numbers[0]} ({numbers[1]} to {numbers[2]}) 0.800 (0.800"
    for value in (found.sentence, f"{EVIL} {row}", f"{found.verdict.time_to_loss.mean:.3f} ("):
        assert value in text
        assert any(value in line for line in lines)
    assert lines[-1] == found.sentence
    again = write_pilot_page(found, runs, tmp_path / "again.html").read_text(encoding="ascii")
    assert again == page


def test_a_pilot_that_lacks_something_has_a_page(tmp_path, ranks):
    ranks.step_s *= 1.1
    found, runs = result_of(pilot_in(tmp_path, 1).run(lambda title: None))
    assert found.verdict.time_to_loss is None
    page = write_pilot_page(found, runs, tmp_path / "pilot.html").read_text(encoding="ascii")
    assert "too far apart to decide" in page
    assert ">None<" not in page
    assert json.loads(json.dumps(asdict(found)))["arms"][0]["valid_loss"]["low"] is None
