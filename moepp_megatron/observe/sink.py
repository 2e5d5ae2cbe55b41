"""What takes records."""

from __future__ import annotations

from typing import Protocol

from moepp_megatron.observe.metrics import StepMetrics


class Sink(Protocol):
    """Takes the record of every logged step. One rank of a run owns the sinks."""

    def write(self, record: StepMetrics) -> None:
        """Takes one record."""

    def go_back(self, step: int) -> None:
        """The run has gone back to the state after `step`: records of later steps do not count."""

    def close(self) -> None:
        """Ends the sink; nothing is written after it."""
