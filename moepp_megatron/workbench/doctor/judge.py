"""The standards by which checks judge a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.hardware import Hardware, Thresholds
from moepp_megatron.workbench.doctor.finding import Severity


@dataclass(frozen=True)
class Judge:
    """The standards by which checks judge a GPU.

    Attributes:
        hardware: Rated numbers of its kind; None where the kind is not described.
        thresholds: The limits beyond which a measurement is a finding.
        preflight: Whether a job is about to start, which occupied or slow GPUs must prevent.
        own_pids: Processes that belong to this examination.
    """

    hardware: Hardware | None
    thresholds: Thresholds
    preflight: bool = False
    own_pids: frozenset[int] = frozenset()

    @property
    def unfit_now(self) -> Severity:
        """Severity of a problem that spoils a run but is not a defect of the machine."""
        return Severity.ERROR if self.preflight else Severity.WARNING
