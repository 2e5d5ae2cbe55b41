"""Settings of stages in the section `data`: blends that replace the one before."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from moepp_megatron.config.blends import first_step
from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import each, refuse, table
from moepp_megatron.config.schema.data import BlendPart
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


class DataStage(Section):
    """One stage: a blend, and where it begins. A folder continues where it was left."""

    from_step: Annotated[int | None, Unit("steps", ge=1)] = None
    """Steps that the run has taken when the stage begins, refused batches included"""
    from_tokens: Annotated[float | None, Unit("tokens", gt=0)] = None
    """The same in tokens, rounded up to a whole step; instead of from_step"""
    blend: list[BlendPart]
    """Folders that are trained on together"""


def _begins(config: "Config") -> Iterator[tuple[str, dict[str, float | None]]]:
    for index, stage in enumerate(config.data.stages):
        begins = {"from_step": stage.from_step, "from_tokens": stage.from_tokens}
        yield f"data.stages[{index}]", begins


def _stages_follow_each_other(config: "Config") -> Iterator[Problem]:
    """Each stage has steps of its own; a stage that never begins is not wrong, but ignored."""
    before = 0
    for index, stage in enumerate(config.data.stages):
        key = "from_step" if stage.from_step is not None else "from_tokens"
        value, begins = getattr(stage, key), first_step(config, stage)
        if value is not None and begins <= before:
            rule = f"must begin after step {before}, where the blend before it does"
            yield Problem(f"data.stages[{index}].{key}", value, rule, "put the stages in order")
        before = begins


def _stages_behind_the_end(config: "Config") -> Iterator[Problem]:
    """A run that is trained in parts may name them all the same."""
    steps, remedy = config.training.train_iters, "raise training.train_iters, or leave it out"
    for index, stage in enumerate(config.data.stages):
        step = first_step(config, stage)
        if step >= steps:
            reason = f"has no effect: the run ends at training.train_iters ({steps})"
            yield Problem(f"data.stages[{index}]", f"from step {step}", reason, remedy)


class DataStageSettings(Section):
    """Stages of the data."""

    stages: list[DataStage] = []
    """Blends that replace the one before at a step or a number of tokens, in order"""

    own_rules = table(
        refuse(
            "data.stages",
            "data.stages and data.path null and not data.blend",
            "must come with the data of the steps before the first of them",
            "set data.path or data.blend",
            value=lambda c: f"{len(c.data.stages)} stages",
        ),
        each(
            _begins,
            lambda begins: (begins["from_step"] is None) == (begins["from_tokens"] is None),
            "must have one of from_step and from_tokens",
            "give one of them",
        ),
        # Where a stage begins is counted in batches.
        refuse(
            "training.batch_ramp",
            "data.stages and not training.batch_ramp null",
            "must be null with data.stages, which begin after a number of equal batches",
            "leave out one of the two",
        ),
        _stages_follow_each_other,
    )
    no_effect = table(
        _stages_behind_the_end,
    )
