"""The runs of `moepp thin`, as trials of the runner."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config import Config
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.training.thin import last_record
from moepp_megatron.workbench.experiments.runner import Trial


@dataclass(frozen=True)
class ThinRun(Trial[StepMetrics]):
    """A training run, which continues from its newest checkpoint."""

    option, stoppable = "OUT", True
    config: Config

    @property
    def command(self) -> list[str]:
        """`moepp train`, with the file in OUT/configs."""
        return ["train", "--resume", "--", str(self.folder / "configs" / f"{self.name}.yaml")]

    def result(self) -> StepMetrics | None:
        """The last record, once its last step is done and saved."""
        return last_record(self.config)
