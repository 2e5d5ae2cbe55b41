"""Writes a run's records to Weights & Biases, or to files to upload later."""

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.catalogue import OF_RECORD
from moepp_megatron.config.schema import WandbSection
from moepp_megatron.experts import ExpertCounts
from moepp_megatron.file_names import WANDB_ID_FILE
from moepp_megatron.observe.metrics import StepMetrics
from moepp_megatron.observe.numbers import is_curve, numbers, path_of
from moepp_megatron.runtime.optional import how_to_install

logger = logging.getLogger(__name__)

# A service that does not answer must not hold GPUs for minutes before the first step.
_INIT_TIMEOUT_S = 30


class WandbSink:
    """Logs every number of a record; `moe_layers` is that of `numbers`.

    The package's own process sends them and handles access itself (`wandb login` or
    `WANDB_API_KEY`), so that no key passes through here. It gets neither console output nor source
    code. If `resumes`, the W&B run of the checkpoint continues too. Raises ImportError if wandb is
    not installed; RuntimeError, without the key in its message, if it cannot start.
    """

    def __init__(
        self,
        settings: WandbSection,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        experts: ExpertCounts,
        resumes: bool,
        moe_layers: Sequence[int] = (),
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"observe.wandb needs the wandb package; {how_to_install('wandb')}"
            ) from error
        self._moe_layers = moe_layers
        self._experts = experts
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=name,
                id=_run_id(run_dir, resumes),
                resume="allow",
                mode=settings.mode,
                dir=str(run_dir),
                config=dict(config),
                save_code=False,
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    init_timeout=_INIT_TIMEOUT_S,
                    silent=True,
                ),
            )
            # Steps that are taken again after a rollback would be refused as W&B's own step.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise RuntimeError(f"W&B cannot start: {_without_key(error)}") from None

    def write(self, record: StepMetrics) -> None:
        """Pass the record to W&B's process."""
        self._run.log(
            {
                "/".join([key, *(path_of(OF_RECORD[key], labels) if labels else ())]): value
                for key, labels, value in numbers(record, self._experts, self._moe_layers)
                if not labels or is_curve(OF_RECORD[key])
            }
        )

    def go_back(self, step: int) -> None:
        """Do nothing: W&B keeps both records of a repeated step, and none can be removed."""

    def close(self) -> None:
        """End the W&B run after all has been sent or written."""
        self._run.finish()


def _run_id(run_dir: Path, resumes: bool) -> str:
    """The id of this run at W&B, kept in its folder for a resumed run; a new run gets a new one."""
    path = run_dir / WANDB_ID_FILE
    if resumes and path.is_file():
        kept = path.read_text(encoding="utf-8").strip()
        if kept:
            return kept
    new = uuid.uuid4().hex[:12]
    path.write_text(new + "\n", encoding="utf-8")
    return new


def _without_key(error: Exception) -> str:
    """The error in one line, without the key."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text
