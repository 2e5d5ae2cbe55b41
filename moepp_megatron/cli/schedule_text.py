"""Draws the schedule of a run: learning rate and batch size over its steps, in a line each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

from moepp_megatron.config import Config
from moepp_megatron.tools.report.terminal import wide_console

_WIDTH = 40
# Heights of a column, lowest first, for terminals with and without Unicode.
_LEVELS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_LEVELS = "_.-~=+*#"


def schedule_lines(config: Config) -> list[str]:
    """The learning rate, and the batch size where it is ramped.

    megatron-core computes both, so this takes the seconds that its import takes.
    """
    from moepp_megatron.runtime.optional import quiet

    quiet()
    from moepp_megatron.training.schedule import batch_stages, learning_rate, planned_samples

    last = config.training.train_iters
    columns = min(last, _WIDTH)
    shown = [1 + place * (last - 1) // max(columns - 1, 1) for place in range(columns)]
    rates = [learning_rate(config, step) for step in shown]
    levels = _ASCII_LEVELS if wide_console().options.ascii_only else _LEVELS
    spark = partial(_columns, levels=levels)
    # Where the rate is highest: the last step of warmup.
    top = max(config.warmup_iters, 1)
    lines = [
        f"learning rate  {spark(rates)}  {rates[0]:.3g} at step 1, "
        f"{learning_rate(config, top):.3g} at step {top:,}, {rates[-1]:.3g} at step {last:,}"
    ]
    if config.training.batch_ramp is not None:
        stages = batch_stages(config)
        firsts = [stage.first_step for stage in stages]
        sizes = [float(stages[bisect_right(firsts, step) - 1].size) for step in shown]
        later = "".join(f", {stage.size:,} from step {stage.first_step:,}" for stage in stages[1:])
        tokens = planned_samples(config) * config.model.seq_length
        lines.append(
            f"batch          {spark(sizes)}  {stages[0].size:,} sequences{later}; "
            f"{tokens:,} tokens in all"
        )
    return lines


def _columns(values: Sequence[float], levels: str) -> str:
    low, high = min(values), max(values)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((value - low) * scale)] for value in values)
