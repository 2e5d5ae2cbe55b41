"""What the checks of a card measure it by."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.hardware import Hardware, Thresholds
from moepp_megatron.workbench.doctor.finding import Severity


@dataclass(frozen=True)
class Judge:
    """What is expected of a card.

    Attributes:
        hardware: Rated numbers of its kind; None where the kind is not described.
        thresholds: From where on a measurement is a finding.
        preflight: Whether a job is about to start, which taken or slow cards must prevent.
        own_pids: Processes that belong to this examination.
    """

    hardware: Hardware | None
    thresholds: Thresholds
    preflight: bool = False
    own_pids: frozenset[int] = frozenset()

    @property
    def unfit_now(self) -> Severity:
        """Severity of what spoils a run but not the machine."""
        return Severity.ERROR if self.preflight else Severity.WARNING
