"""Settings of features that have no effect."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rows import Rule, no_effect_where, no_effect_with, refuse
from moepp_megatron.config.schema import Config


def _stages_behind_the_end(config: Config) -> Iterator[Problem]:
    """A run that is trained in parts may name them all the same."""
    steps, remedy = config.training.train_iters, "raise training.train_iters, or leave it out"
    for index, stage in enumerate(config.data.stages):
        step = first_step(config, stage)
        if step >= steps:
            reason = f"has no effect: the run ends at training.train_iters ({steps})"
            yield Problem(f"data.stages[{index}]", f"from step {step}", reason, remedy)


RULES: tuple[Rule, ...] = (
    no_effect_where(
        lambda c: c.moe.budget.target_ffn_per_token is not None,
        "with moe.budget.target_ffn_per_token, from which tau follows",
        "moe.tau",
        "leave one of them out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "none",
        "without moe.budget.controller",
        "moe.budget.response moe.budget.gain moe.budget.decay moe.budget.scope",
        "use bias or tau",
    ),
    no_effect_where(
        lambda c: c.moe.budget.measures_gain,
        "without moe.budget.gain",
        "moe.budget.decay",
        "set it, or leave this out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "bias" and not c.moe.budget.measures_gain,
        "with moe.budget.gain, which is fixed",
        "moe.budget.response",
        "leave one of them out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.held_by == "tau",
        "with moe.budget.controller tau",
        "moe.budget.response",
        "use bias, or leave it out",
    ),
    no_effect_where(
        lambda c: c.moe.budget.start_ffn_per_token is None,
        "without moe.budget.start_ffn_per_token",
        "moe.budget.ramp_begin moe.budget.ramp_steps",
        "set it, or leave this out",
    ),
    no_effect_where(
        lambda c: not c.moe.budget.acts,
        "without moe.budget.target_ffn_per_token or controller",
        "moe.budget.start_ffn_per_token",
        "set one of them, or leave it out",
    ),
    # The measured bias moves all FFN experts alike; the balance loss distinguishes them.
    refuse(
        "moe.balance_coeff",
        lambda c: c.moe.budget.measures_gain and c.moe.balance_coeff == 0,
        "leaves nothing that evens out FFN experts among each other with moe.budget.controller "
        "bias and no moe.budget.gain",
        "use 0.01, or set moe.budget.gain for LongCat-Flash's rule, which moves each expert's",
    ),
    no_effect_with(
        "model.mtp_num_layers",
        0,
        "model.mtp_loss_scaling_factor",
        "set model.mtp_num_layers above 0",
    ),
    no_effect_with(
        "training.eval_iters",
        0,
        "training.eval_interval data.validation",
        "set training.eval_iters above 0",
    ),
    _stages_behind_the_end,
)
