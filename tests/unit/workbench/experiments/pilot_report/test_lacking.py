"""Pilots that lack something: intervals, a target, a baseline, what tokens are worth."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.workbench.experiments.pilot_report.made_up import (
    contents,
    interval,
    without_intervals,
)
from tests.unit.workbench.experiments.pilot_report.terminal_reader import printed


@pytest.mark.usefixtures("unrendered")
def test_a_single_seed_has_no_intervals(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = without_intervals(contents())
    found["verdicts"] = [one | {"at_pilot": "undecided"} for one in found["verdicts"]]
    page = read_whole(found)
    assert page.cell("arms", "MoE++ tau 0.75", "Difference to vanilla") == "+0.0031"
    assert page.cell("verdicts", "MoE++ tau 0.75", "Loss after vanilla's time") == "-0.0380"
    assert "0.861, one seed" in page.pictures[0][1]
    assert "with one seed nobody knows how sure that is" in page.text
    assert "None" not in page.text
    assert "None" not in printed(found, capsys)


def test_without_a_target_the_page_says_how_to_ask_for_one(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"target": None}
    for each in found["verdicts"]:
        each |= {"target_time_to_loss": None, "at_target": None}
    found["setting"]["command"] = "moepp pilot CONFIG --out DIR"
    page = read(found)
    assert "target" not in page.tables
    assert "No target was asked for" in page.text
    assert page.text.count("moepp pilot CONFIG --out DIR --gpus GPUS --gpu h100") == 2
    assert page.badges[1] == (
        "none",
        ["At the target", "no answer", "No target was asked for: --gpus asks for one."],
    )
    assert "sbatch --nodes=N" in page.text
    assert "target" not in printed(found, capsys)


def test_a_model_that_does_not_fit_has_no_numbers(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents()
    found["target"]["models"][2] = {
        "arm": "MoE++ tau 0.75",
        "layout": "none is legal",
        "fits": False,
    }
    found["target"]["price_per_hour"] = None
    found["verdicts"][0] |= {"target_time_to_loss": None, "at_target": None}
    page = read(found)
    row = next(r for r in page.tables["target"] if r[0].startswith("MoE++ tau 0.75"))
    assert row[0] == "MoE++ tau 0.75 does not fit the GPUs"
    assert row[1] == "none is legal"
    assert set(row[2:]) == {"-"}
    assert len(row) == len(page.tables["target"][0])
    assert "Cost" not in page.tables["target"][0]
    assert "no price was given" in page.text
    assert page.badges[1][1][2] == "MoE++ tau 0.75: it or vanilla does not fit the GPUs."
    assert "none is legal" in printed(found, capsys)


def test_without_a_narrowed_model_nothing_is_said_at_equal_compute(read: Any) -> None:
    found = contents() | {"equal_compute": []}
    found["arms"] = [one for one in found["arms"] if one["arm"]["kind"] != "narrow"]
    page = read(found)
    assert "computes" not in page.tables
    assert "No vanilla model of the same compute was trained." in page.text


@pytest.mark.usefixtures("unrendered")
def test_what_tokens_are_worth_may_be_unknown(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents()
    found["token_value"] = interval(0.02, 0.3)
    nothing = {"token_factor": None, "time_to_loss": None, "target_time_to_loss": None}
    nothing["stakes"] = None
    found["verdicts"] = [each | nothing | {"at_pilot": "undecided"} for each in found["verdicts"]]
    page = read_whole(found)
    assert page.cell("verdicts", "MoE++ tau 0.75", "Time to equal loss") == "-"
    assert "nobody can say what tokens are worth" in page.text
    assert "MoE++ falls further behind vanilla than in the pilot" in page.text
    assert "Step time over vanilla's below 1" in page.text
    assert len(page.pictures) == 3
    assert "None" not in page.text
    assert "undecided" in printed(found, capsys)


def test_intervals_that_leave_the_plot_are_drawn(read_whole: Any) -> None:
    found = contents()
    found["verdicts"][0]["time_to_loss"] = {"mean": 0.8, "low": 1e-30, "high": 1e30}
    found["verdicts"][1]["time_to_loss"] = {"mean": 7.5, "low": 6.0, "high": 9.0}
    page = read_whole(found)
    assert len(page.pictures) == 4
    assert "7.500 (6.000 to 9.000)" in page.pictures[0][1]


def test_a_pilot_whose_moepp_arms_are_missing(
    read_whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"verdicts": [], "equal_compute": [], "recommended": None, "caveats": []}
    found["arms"] = found["arms"][:1]
    found["arms"][0]["curve"] = {"tokens": [], "loss": []}
    page = read_whole(found)
    assert "No MoE++ arm has finished." in page.text
    assert "No arm has a curve" in page.text
    assert "How to go on" not in page.text
    assert "recommended: none" in printed(found, capsys)
