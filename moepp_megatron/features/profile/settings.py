"""Settings of profiles in the section `training`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from moepp_megatron.config.errors import Problem
from moepp_megatron.config.rows import WorldSizeRule, no_effect_without, table
from moepp_megatron.config.schema.section import Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


def _profiled_steps_follow_each_other(config: "Config") -> Iterator[Problem]:
    """One recording, from its first step to its last, within the run."""
    steps, last = config.training.profile_steps, config.training.train_iters
    if not steps:
        return
    if min(steps) < 1 or max(steps) > last:
        rule = f"must be steps from 1 to training.train_iters ({last})"
        remedy = "use steps of this run, after the first few, which also warm up"
    elif steps != list(range(steps[0], steps[0] + len(steps))):
        rule = "must follow each other, because they are one recording"
        remedy = f"use {list(range(min(steps), min(steps) + len(set(steps))))}"
    else:
        return
    yield Problem("training.profile_steps", steps, rule, remedy)


def _profiled_ranks_exist(config: "Config", world_size: int) -> Iterator[Problem]:
    """Ranks to be recorded are ranks of the run."""
    name, ranks = "training.profile_ranks", config.training.profile_ranks
    if not config.training.profile_steps or ranks is None:
        return
    if not ranks or not all(0 <= rank < world_size for rank in ranks):
        rule = f"must be ranks from 0 to {world_size - 1}"
        yield Problem(name, ranks, rule, "use null for all, or [0]")


class ProfileSettings(Section):
    """Steps that are recorded, and where."""

    profile_steps: Annotated[list[int], Unit("-")] = []
    """Steps to record with torch's profiler, to RUN/profile; empty is off"""
    profile_ranks: Annotated[list[int] | None, Unit("-")] = None
    """Ranks that record them; null is all, without which waiting for late ranks cannot be
    distinguished from transfer"""

    own_rules = table(
        _profiled_steps_follow_each_other,
    )
    world_size_rules: ClassVar[tuple[WorldSizeRule, ...]] = (_profiled_ranks_exist,)
    of_one_run: ClassVar[str] = "profile_steps profile_ranks"
    no_effect = table(
        no_effect_without("training.profile_steps", "training.profile_ranks", "name some steps"),
    )
