"""The stages of a roll-out: commands, conditions, what is next."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.workbench.experiments.pilot.report.stages import stages
from moepp_megatron.workbench.experiments.pilot.result import PilotResult
from tests.unit.workbench.experiments.pilot_report.made_up import (
    contents,
)
from tests.unit.workbench.experiments.pilot_report.terminal_reader import printed


def test_break_even_is_one_over_the_token_factor(read: Any) -> None:
    found = contents()
    found["verdicts"][0]["token_factor"] = {"mean": 1.25, "low": 1.0, "high": 1.6}
    text = read(found).text
    # 1 / 1.25, and 1 / 1.6 to be sure.
    assert text.count("Step time over vanilla's at most 0.800 by") == 2
    assert text.count("0.625 to be sure of it at 95%") == 2
    # 1 / (1.25 x 0.879) - 1 = -9.0%
    assert "expects a time ratio of 0.879, which is not enough" in text
    # The pilot's loss over the interval's half width times sqrt(seeds + 1).
    assert "Validation loss of 3.5031 after 400 steps , to within 0.0420" in text.replace(
        "steps,", "steps ,"
    )
    # 0.471 log(1 / 0.855) and 0.471 log(1 / 0.879).
    assert "MoE++ is 0.0738 nats or more behind vanilla" in text
    assert "MoE++ is 0.0607 nats or more behind vanilla" in text
    # 0.6 of the measured share, by the guard's own rule.
    assert "FFN share below 35.9%" in text


def test_commands_are_made_of_the_pilots_own(read: Any) -> None:
    text = read(contents()).text
    run = "pilots/first/configs/moepp-tau-0.75-seed-1.yaml"
    assert f"moepp train {run} --nproc 8 --dry-run" in text
    assert f"moepp scale {run} --nproc 8 --out scaling-node" in text
    # Settings of the pilot's CONFIG do not belong to another target.
    assert (
        "moepp plan configs/models/moepp_7b_16_4.yaml moe.tau=0.75 --gpus 64 --gpu h100_sxm "
        "--tokens 1e+12 --price 2.5 --out planned.yaml" in text
    )
    assert "sbatch --nodes=8 slurm/preflight.sbatch" in text
    found = contents()
    found["target"]["name"] = "quickstart"
    assert "moepp plan configs/quickstart.yaml data.path=data/mine moe.tau=0.75 --gpus" in (
        read(found).text
    )


def test_commands_of_the_page_exist() -> None:
    import typer

    from moepp_megatron.cli.main import app
    from moepp_megatron.workbench.experiments.pilot.report.commands import Commands

    result = PilotResult.model_validate(contents())
    commands = Commands(result, result.arms[3])
    known = typer.main.get_command(app)
    checked = 0
    for line in [*commands.node(), *commands.cluster()]:
        program, name, *rest = line.split()
        if program == "sbatch":
            assert Path(rest[0]).is_file()
        elif program == "moepp":
            options = {o for p in known.commands[name].params for o in p.opts}
            assert {word for word in rest if word.startswith("--")} <= options
            checked += 1
    assert checked == 7


def test_healthy_ranges_are_those_of_the_documentation(read: Any) -> None:
    page = read(contents())
    documented = Path("docs/routing.md").read_text()
    rows = page.tables["watch"][1:]
    assert [row[0] for row in rows][:3] == ["ffn_fraction", "max_ffn_load", "gate_entropy"]
    for metric, _, _, healthy, _ in rows:
        (line,) = re.findall(rf"^\| `{metric}`.*$", documented, re.MULTILINE)
        assert healthy in line.split("|")[3]
    assert page.cell("watch", "ffn_fraction", "This pilot") == "0.598"
    wrong = page.cell("watch", "logit_variance", "Something is wrong")
    assert wrong == "above 100 for 20 steps (logit_explosion)"


def test_where_nothing_pays_the_rollout_ends_with_the_pilot(
    read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = contents() | {"recommended": None}
    for each in found["verdicts"]:
        each |= {"at_pilot": "does not pay", "at_target": "does not pay"}
    page = read(found)
    assert page.badges[2][1][1] == "none: stay with vanilla"
    assert "1. Pilot" in page.text
    assert "ends here" in page.text
    assert "2. One node" not in page.text
    assert "moepp slurm" not in page.text
    assert "watch" not in page.tables
    assert "recommended: none: stay with vanilla" in printed(found, capsys)


def test_an_undecided_pilot_names_the_next_look(read: Any) -> None:
    found = contents()
    found["verdicts"][0]["at_pilot"] = "undecided"
    assert "go on to the next one with --seeds 6" in read(found).text
    found["verdicts"][0]["stakes"] = {"adopted": 0.004, "kept": 0.002}
    assert "either choice is expected to lose less than 1%" in read(found).text
    found["setting"]["look"] = 0
    assert "the first look has not come: --seeds 6" in read(found).text


@pytest.mark.parametrize(
    ("at_pilot", "at_target", "states"),
    [
        ("pays", "undecided", ["done", "next", "later"]),
        ("does not pay", "pays", ["done", "next", "later"]),
        ("undecided", "undecided", ["next: not decided yet", "later", "later"]),
        ("undecided", None, ["next: not decided yet", "later", "later"]),
    ],
)
def test_what_is_next_follows_from_the_answers(
    at_pilot: Any, at_target: Any, states: list[str]
) -> None:
    found = contents()
    found["verdicts"][0] |= {"at_pilot": at_pilot, "at_target": at_target}
    rollout = stages(PilotResult.model_validate(found))
    assert [stage.state for stage in rollout] == states
    assert f"Found: {at_target or at_pilot}" in rollout[0].go_on[0]


def test_two_seeds_give_no_range_for_a_further_run() -> None:
    found = contents()
    for each in found["arms"]:
        each["seeds"] = [1, 2]
    conditions = stages(PilotResult.model_validate(found))[1].go_on
    assert "to within" not in " ".join(conditions)
    assert "So few seeds have no spread to go by" in conditions[1]
