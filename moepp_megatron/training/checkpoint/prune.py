"""Deletes old checkpoints. Runs on rank 0 alone, after a newer one is complete."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from moepp_megatron.training.checkpoint.find import list_checkpoints
from moepp_megatron.training.checkpoint.leftovers import discard, remove_leftovers
from moepp_megatron.training.checkpoint.validity import damage

logger = logging.getLogger(__name__)


class Pruner:
    """Keeps the newest valid checkpoints of a folder.

    A checkpoint that cannot be read is neither counted nor deleted: it may be all that is left of
    something. What killed runs left half written is removed.

    Args:
        folder: The run's checkpoint folder.
        keep: Valid checkpoints to keep; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self._folder = folder
        self._keep = keep
        # Hashing a checkpoint takes time, so each is looked at once. Those that this run writes
        # were hashed as they were written.
        self._is_valid: dict[str, bool] = {}

    def wrote(self, checkpoint: Path) -> None:
        """Note a checkpoint that this run has just completed, and delete what is now too old."""
        self._is_valid[checkpoint.name] = True
        try:
            self._prune()
            remove_leftovers(self._folder)
        except OSError as error:
            logger.error("old checkpoints could not be deleted: %s", error)

    def _prune(self) -> None:
        if self._keep is None:
            return
        valid = [path for path in list_checkpoints(self._folder) if self._valid(path)]
        for checkpoint in valid[self._keep :]:
            discard(checkpoint, secrets.token_hex(4))

    def _valid(self, checkpoint: Path) -> bool:
        if checkpoint.name not in self._is_valid:
            reason = damage(checkpoint)
            self._is_valid[checkpoint.name] = reason is None
            if reason is not None:
                logger.warning("checkpoint.keep leaves %s alone: %s", checkpoint, reason)
        return self._is_valid[checkpoint.name]
