"""A pilot's result in the terminal."""

from __future__ import annotations

from moepp_megatron.workbench.experiments.pilot.page import arm_table
from moepp_megatron.workbench.experiments.pilot.result import PilotResult
from moepp_megatron.workbench.report.terminal import plain_table, print_uncut

# Columns of the page that fit a terminal.
_COLUMNS = ("Arm", "Steps", "Validation loss", "Less vanilla's", "Of vanilla's", "FFN share")


def print_pilot(result: PilotResult) -> None:
    """The arms with 95% intervals, and the answer last."""
    arms = arm_table(result)
    shown = [name for name in _COLUMNS if name in arms.head]
    table = plain_table(*shown, words=1)
    for row in arms.rows:
        cells = [row[arms.head.index(name)] for name in shown]
        table.add_row(*(f"{c.text} [{c.note}]" if c.note else c.text for c in cells))
    verdict = result.verdict
    print_uncut(
        table,
        f"step of MoE++ over vanilla's: {verdict.speed.mean:.3f} in {result.setting.sessions} "
        f"sessions, {verdict.speed_in_runs.mean:.3f} in the runs",
        result.sentence,
    )
