"""Settings of profiles in the section `training`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from moepp_megatron.config.rows import Rule, no_effect_without
from moepp_megatron.config.schema.section import Section, Unit


class ProfileSettings(Section):
    """Steps that are recorded, and where."""

    profile_steps: Annotated[list[int], Unit("-")] = []
    """Steps to record with torch's profiler, to RUN/profile; empty is off"""
    profile_ranks: Annotated[list[int] | None, Unit("-")] = None
    """Ranks that record them; null is all, without which waiting for late ranks cannot be
    distinguished from transfer"""

    no_effect: ClassVar[tuple[Rule, ...]] = (
        no_effect_without("training.profile_steps", "training.profile_ranks", "name some steps"),
    )
