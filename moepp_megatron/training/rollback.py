"""Loads an earlier checkpoint of the run in the middle of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from moepp_megatron.config import Config
from moepp_megatron.training.checkpoint import CheckpointWriter, newest_valid, read_checkpoint
from moepp_megatron.training.checkpoint.files import Progress
from moepp_megatron.training.run_folder import checkpoint_folder
from moepp_megatron.training.setup import TrainingModel


def newest_checkpoint(
    config: Config, writer: CheckpointWriter, up_to_step: int | None = None
) -> Path | None:
    """The newest valid checkpoint of the run; every rank must call.

    Args:
        config: The run's configuration.
        writer: The checkpoint writer, which may still be writing one.
        up_to_step: Only those after at most this many steps.
    """
    writer.finish()
    return newest_valid(checkpoint_folder(config), up_to_step)


def load_earlier(
    checkpoint: Path, model: TrainingModel, config: Config, before: Progress
) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint; data continue after all that has been read. Every rank must call.

    Args:
        checkpoint: A verified checkpoint.
        model: The wrapped model.
        config: The run's configuration.
        before: The run's progress before.

    Returns:
        The new progress, and the rest of the checkpoint's state.
    """
    loaded = read_checkpoint(checkpoint, model, config)
    progress = replace(
        loaded.progress,
        consumed_samples=before.consumed_samples,
        skipped_steps=before.skipped_steps,
    )
    return progress, loaded.extra
