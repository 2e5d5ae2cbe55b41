"""A pilot's tables in the terminal."""

from __future__ import annotations

import pytest

from tests.unit.workbench.experiments.pilot_report.made_up import (
    contents,
)
from tests.unit.workbench.experiments.pilot_report.terminal_reader import printed


def test_the_terminal_shows_the_answer_last(capsys: pytest.CaptureFixture[str]) -> None:
    found = contents()
    text = printed(found, capsys)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert (
        "MoE++ tau 0.75 3.5031 +0.0031 [-0.0029, +0.0091] 684.0 ms 0.855 [0.843, 0.867] 5,988 "
        "59.8% 15.05" in lines
    )
    assert (
        "MoE++ tau 0.75 -0.0380 [-0.0440, -0.0320] -0.0579 [-0.0669, -0.0489] "
        "98.7% pays undecided" in lines
    )
    assert (
        "time to vanilla's loss, MoE++ tau 0.75: 0.861 [0.828, 0.895] of vanilla's, at the target "
        "0.885 [0.797, 0.982]" in lines
    )
    assert "alerts of MoE++ tau 0.75: dead_expert 2" in lines
    assert lines[-2:] == [found["answer"], "recommended: MoE++ tau 0.75"]
