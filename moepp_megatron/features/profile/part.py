"""Profiles of single steps (`training.profile_steps`) as a part of the run."""

from __future__ import annotations

from collections.abc import Iterable

from moepp_megatron.config import Layout
from moepp_megatron.features.profile.recorder import StepRecorder
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.training.part import Part, PartContext, Step


class ProfilePart(Part):
    """Records the steps that the configuration names."""

    def __init__(self, recorder: StepRecorder) -> None:
        self._recorder = recorder

    @classmethod
    def of(cls, run: PartContext) -> ProfilePart | None:
        """The part of a run; None where no step is recorded."""
        if not run.config.training.profile_steps:
            return None
        return cls(StepRecorder(run.config, run.layout, run.model))

    def begin_step(self, step: int, layout: Layout) -> None:
        """Start or end the recording if it is due before `step`."""
        self._recorder.begin_step(step)

    def end_step(self, step: Step) -> Iterable[Alert]:
        """End the step in the recording."""
        self._recorder.end_step()
        return ()

    def end(self) -> None:
        """End the recording and write it."""
        self._recorder.close()
