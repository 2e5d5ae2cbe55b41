"""Saves a checkpoint: prepare, plan, write in the foreground or background, agree, publish."""

from __future__ import annotations

import contextlib
import copy
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.file_names import MANIFEST_FILE
from moepp_megatron.runtime.agreement import Agreement
from moepp_megatron.runtime.disk import NO_SPACE
from moepp_megatron.runtime.object_store import ObjectPath, StoreError
from moepp_megatron.training import rng
from moepp_megatron.training.checkpoint.background import (
    Background,
    BackgroundError,
    BackgroundUpload,
)
from moepp_megatron.training.checkpoint.files import (
    Progress,
    SavedRecord,
    checkpoint_name,
    plain_damage,
)
from moepp_megatron.training.checkpoint.plan import Planner, SavePlan, Written
from moepp_megatron.training.checkpoint.publish import Companions, publish, tokenizer_files, upload
from moepp_megatron.training.checkpoint.read import agreed_reason
from moepp_megatron.training.checkpoint.retention import (
    Pruner,
    incomplete_name,
    remove_leftovers,
    space_text,
)
from moepp_megatron.training.checkpoint.state import saved_state
from moepp_megatron.training.setup import TrainingModel

logger = logging.getLogger(__name__)

_POLL_S = 0.02


@dataclass
class _Save:
    """A save in progress."""

    final: Path
    plan: SavePlan
    companions: Companions
    # Writes this rank's files; None where it could not be started, and why.
    process: Background | BackgroundUpload | None = None
    failure: str | None = None

    def write(self) -> Written:
        """Write this rank's files, and upload them if the checkpoint is in object storage."""
        return self._sent(self.plan.write())

    def start(self) -> None:
        """Write in the background."""
        try:
            process = Background(self.plan.write)
            is_far = isinstance(self.final, ObjectPath)
            self.process = BackgroundUpload(process, self._sent) if is_far else process
        except OSError as error:
            self.failure = f"no process could be started ({error})"

    def result(self) -> Written:
        """Wait for the write and return its result."""
        if self.process is None:
            raise BackgroundError(self.failure or "no process was started")
        written: Written = self.process.result()
        return written

    def _sent(self, written: Written) -> Written:
        if isinstance(self.final, ObjectPath):
            return upload(written, self.plan.folder, self.final)
        return written


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one and makes the same calls.

    A save that fails on any rank fails on all: it does not become a checkpoint, `error`
    says why, and training can continue.

    Args:
        folder: The run's checkpoint folder, also in object storage; made when first needed.
        config: The run's configuration.
        tokenizer: The tokenizer's file; its present content goes into each checkpoint.

    Attributes:
        failed_saves: Saves that failed so far.
        error: What is wrong with the last save; None if nothing is.
        last_failure: The most recent error; a later success does not clear it.
        written: Complete checkpoints, oldest first, until a reader takes them out.
    """

    def __init__(self, folder: Path, config: Config, tokenizer: Path) -> None:
        self.failed_saves = 0
        self.error: str | None = None
        self.last_failure: str | None = None
        self.written: list[Path] = []
        self._newest: Path | None = None
        self._folder = folder
        self._config = config
        self._is_first = dist.get_rank() == 0
        self._tokenizer = tokenizer_files(tokenizer) if self._is_first else {}
        self._layout = Layout.from_config(config, dist.get_world_size())
        self._agreement = Agreement()
        self._planner = Planner()
        self._pruner = Pruner(folder, config.checkpoint.keep)
        self._save: _Save | None = None
        # Files are written there, and a checkpoint that is complete has its name in `folder`.
        self._uploads = isinstance(folder, ObjectPath)
        self._staging = folder
        if self._is_first:
            # They may be what fills the disk.
            remove_leftovers(folder)
        if self._uploads:
            # Each machine may have a folder of its own.
            self._staging = config.checkpoint.staging_folder(config.run.dir)
            remove_leftovers(self._staging)

    def save(
        self, model: TrainingModel, progress: Progress, extra: dict[str, Any] | None = None
    ) -> Path:
        """Save the present state; with `checkpoint.async_save` return while it is being written.

        A save that is still being written is waited for. `extra` is further state, the same on
        every rank: numbers, strings, tensors, lists, dicts.

        Returns:
            The folder that the checkpoint has, or will have, unless the save fails.
        """
        self.finish()
        self.check_newest()
        final = self._folder / checkpoint_name(progress.step)
        temporary = self._prepare(final)
        if temporary is None:
            return final
        with model.gathered_parameters():
            plan, reason = self._planned(model, extra or {}, temporary)
            if plan is None or reason is not None:
                if self._is_first or self._uploads:
                    shutil.rmtree(temporary, ignore_errors=True)
                self._failed(final, str(reason))
                return final
            record = SavedRecord.now(progress, self._layout)
            save = _Save(final, plan, Companions(self._config.to_yaml(), self._tokenizer, record))
            if self._config.checkpoint.async_save:
                self._save = save
                save.start()
            else:
                self._complete(save, save.write)
        return final

    def _planned(
        self, model: TrainingModel, extra: dict[str, Any], folder: Path
    ) -> tuple[SavePlan | None, str | None]:
        """The plan of a save, or a rank's reason, mostly lack of memory, why it has none."""

        def collect() -> dict[str, Any]:
            random = rng.sharded_rng_state(with_data=True)
            return {**saved_state(model), rng.KEY: random, "extra": copy.deepcopy(extra)}

        state, reason = self._tried(collect)
        if state is None or reason is not None:
            return None, reason
        plan = self._planner.plan(state, folder)
        return plan, self._tried(plan.load)[1]

    def _tried[T](self, act: Callable[[], T]) -> tuple[T | None, str | None]:
        """Return `act()` and the first rank's reason for failure; all ranks call."""
        given, reason = None, None
        try:
            given = act()
        except Exception as error:  # whatever it is, no rank may miss the message below
            reason = _describe(error)
        return given, self._agreement.first_reason(reason)

    def is_written(self) -> bool:
        """True if every rank has written its part of a save, so that `finish` completes it.

        Returns at once; every rank must call, and all get the same answer.
        """
        if self._save is None:
            return False
        process = self._save.process
        return self._agreement.all(process is None or process.done())

    @property
    def is_writing(self) -> bool:
        """True if a save is in progress."""
        return self._save is not None

    def finish(self) -> None:
        """Wait until nothing is being written, and complete the save."""
        while (save := self._save) is not None:
            if self.is_written():
                self._save = None
                self._complete(save, save.result)
            else:
                time.sleep(_POLL_S)

    def check_newest(self) -> None:
        """Record a failed save if the newest checkpoint is gone; every rank must call."""
        reason = None
        if self._newest is not None and self._is_first:
            try:
                reason = plain_damage(self._newest)
            except StoreError as error:
                reason = str(error)
        reason = self._agreement.from_first(reason)
        if reason is not None and self._newest is not None:
            self._failed(self._newest, reason, "was complete and is not any more")
            self._newest = None

    def close(self) -> None:
        """End a save that is being written, without waiting for it or for other ranks."""
        if self._save is not None and self._save.process is not None:
            self._save.process.kill()
        self._save = None

    def _prepare(self, final: Path) -> Path | None:
        """The folder to write into, one for all ranks unless they upload; None if there is none."""
        name = incomplete_name(final.name)
        if not self._uploads:
            name = self._agreement.from_first(name)
        temporary = self._staging / name
        reason = None
        if self._is_first or self._uploads:
            try:
                temporary.mkdir(parents=True)
                if self._is_first and isinstance(final, ObjectPath):
                    # Objects cannot be renamed, so an older checkpoint of this step goes first.
                    final.delete_below(MANIFEST_FILE)
            except (OSError, StoreError) as error:
                reason = str(error)
        agree = self._agreement.first_reason if self._uploads else self._agreement.from_first
        reason = agree(reason)
        if reason is None:
            is_there = temporary.is_dir()
            reason = self._agreement.first_reason(
                None if is_there else f"{temporary} is not there; checkpoint.dir must be shared"
            )
        if reason is None:
            return temporary
        if self._uploads:
            shutil.rmtree(temporary, ignore_errors=True)
        self._failed(final, reason)
        return None

    def _complete(self, save: _Save, write: Callable[[], Written]) -> None:
        """Collect every rank's results, publish on rank 0, share the outcome."""
        written, reason = self._tried(write)
        parts = self._agreement.gather((save.plan.num_bytes, written if reason is None else None))
        if self._is_first:
            if reason is None:
                try:
                    publish(save.plan, save.final, [part for _, part in parts], save.companions)
                except Exception as error:  # the other ranks wait to hear of it
                    reason = _describe(error)
            if reason is not None:
                self._remove(save)
                if NO_SPACE in reason:
                    reason += space_text(sum(size for size, _ in parts), self._staging)
        reason = self._agreement.from_first(reason)
        if self._uploads:
            shutil.rmtree(save.plan.folder, ignore_errors=True)
        if reason is not None:
            self._failed(save.final, reason)
            return
        self.error, self._newest = None, save.final
        self.written.append(save.final)
        self._prune(save.final)

    def _prune(self, written: Path) -> None:
        """Delete old checkpoints. All ranks help to verify earlier ones, so none waits long."""
        unknown = self._pruner.unknown(written) if self._is_first else []
        for path in self._agreement.from_first(unknown):
            reason = agreed_reason(path, self._agreement)
            if self._is_first:
                self._pruner.note(path, reason)
        if self._is_first:
            self._pruner.wrote(written)

    def _remove(self, save: _Save) -> None:
        """Remove what a failed save has left, as far as that can be done now."""
        shutil.rmtree(save.plan.folder, ignore_errors=True)
        if isinstance(save.final, ObjectPath):
            # The next save, or the next start, tries again.
            with contextlib.suppress(StoreError):
                save.final.delete_below(MANIFEST_FILE)

    def _failed(self, final: Path, reason: str, what: str = "could not be written") -> None:
        self.failed_saves += 1
        self.error = self.last_failure = f"checkpoint {final} {what}: {reason}"
        if self._is_first:
            logger.error("%s; training continues without it", self.error)


def _describe(error: Exception) -> str:
    """Describe an error in one line, an unexpected one with its class."""
    text = " ".join(str(error).split())
    is_known = isinstance(error, OSError | BackgroundError | StoreError)
    return text if is_known else f"{type(error).__name__}: {text}"
