"""Messages of a resumed run: its checkpoint, and what differs from before."""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.config import Config, Layout, load_config
from moepp_megatron.config.problem import show
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.layer_settings import EXPORTED
from moepp_megatron.training.checkpoint.compatible import differences
from moepp_megatron.training.checkpoint.progress import SavedRecord, grid
from moepp_megatron.training.schedule import learning_rate

# A change of the learning rate by rounding is not reported.
_SAME_LR = 1e-6
# What a token gets from routers and experts depends on these; shapes are refused elsewhere.
_ROUTES = {f"moe.{name}" for name in (*EXPORTED, "router_topk", "capacity_factor")}


def start_lines(
    checkpoint: Path, record: SavedRecord | None, config: Config, layout: Layout
) -> list[str]:
    """A line that names the checkpoint, and a line for each difference from it.

    Args:
        checkpoint: The checkpoint that was loaded.
        record: Its record; None where only its weights were loaded.
        config: The configuration of this run.
        layout: Its rank grid.
    """
    if record is None:
        return [f"started from the weights of {checkpoint}"]
    step = record.progress.step
    lines = [f"resumed from step {step} of {checkpoint}"]
    if changed := record.changed_versions():
        lines.append(
            f"warning: it was written with {', '.join(changed)}: the run may differ in bits from "
            "one without a break"
        )
    if record.layout != grid(layout):
        lines.append(f"  layout: {_grid_text(grid(layout))}; before: {_grid_text(record.layout)}")
    before = load_config(checkpoint / CONFIG_FILE)
    changes = differences(before, config)
    lines += [f"  {name}: {show(now)}; before: {show(was)}" for name, was, now in changes]
    if routed := [name for name, _, _ in changes if name in _ROUTES]:
        lines.append(
            f"warning: {', '.join(routed)}: tokens are routed in another way than the checkpoint "
            "was trained to, until training has adapted the routers"
        )
    old, new = (learning_rate(each, step + 1) for each in (before, config))
    if abs(new - old) > _SAME_LR * max(new, old):
        lines.append(f"  learning rate of step {step + 1}: {new:.3g}; before: {old:.3g}")
    return lines


def _grid_text(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={degree}" for name, degree in layout.items())
