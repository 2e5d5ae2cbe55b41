"""The interface of sinks for records."""

from __future__ import annotations

from typing import Protocol

from moepp_megatron.observe.metrics import StepMetrics


class Sink(Protocol):
    """Receives the record of every logged step. One rank of a run owns the sinks."""

    def write(self, record: StepMetrics) -> None:
        """Receive one record."""

    def go_back(self, step: int) -> None:
        """Note that the run went back to the state after `step`: later records do not count."""

    def close(self) -> None:
        """Ends the sink; nothing is written after it."""
