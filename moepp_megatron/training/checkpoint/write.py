"""Saves the checkpoints of a run: prepare, plan, write, agree, publish, delete old ones."""

import copy
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moepp_megatron.config import Config, ConfigError, Layout
from moepp_megatron.data.tokenizer import Tokenizer, named_eod_token, tokenizer_config
from moepp_megatron.file_names import (
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from moepp_megatron.runtime.disk import NO_SPACE, free_bytes, show_bytes
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.runtime.object_store import ObjectPath, StoreError
from moepp_megatron.training import rng
from moepp_megatron.training.checkpoint.background import BackgroundError
from moepp_megatron.training.checkpoint.files import (
    Progress,
    SavedRecord,
    checkpoint_name,
    plain_damage,
)
from moepp_megatron.training.checkpoint.read import agreed_reason
from moepp_megatron.training.checkpoint.retention import (
    Pruner,
    incomplete_name,
    remove_leftovers,
)
from moepp_megatron.training.checkpoint.save import Save, Written
from moepp_megatron.training.checkpoint.state import saved_state
from moepp_megatron.training.setup import TrainingModel

logger = logging.getLogger(__name__)

_POLL_S = 0.02


class CheckpointWriter:
    """Writes a run's checkpoints. Every rank has one and makes the same calls.

    A save that fails on any rank fails on all: it does not become a checkpoint, `error` says why,
    and training can continue. The folder, maybe in object storage, is made when first needed. The
    file `tokenizer` goes into each checkpoint as it is now.

    Attributes:
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
        self._tokenizer = _tokenizer_files(tokenizer) if self._is_first else {}
        self._layout = Layout.from_config(config, dist.get_world_size())
        self._agreement = Agreement()
        self._pruner = Pruner(folder, config.checkpoint.keep)
        self._save: Save | None = None
        self._is_checked = False
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

        Waits for an earlier save. `extra` is further state, the same on every rank: numbers,
        strings, tensors, lists, dicts. Returns the folder that the checkpoint has or will have
        unless it fails.
        """
        self.finish()
        self.check_newest()
        final = self._folder / checkpoint_name(progress.step)
        temporary = self._prepare(final)
        if temporary is None:
            return final
        companions = {CONFIG_FILE: self._config.to_yaml().encode(), **self._tokenizer}
        record = SavedRecord.now(progress, self._layout)
        save = Save(final, temporary, companions, record)
        with model.gathered_parameters():
            if (reason := self._plan(save, model, extra or {})) is not None:
                if self._is_first or self._uploads:
                    shutil.rmtree(temporary, ignore_errors=True)
                self._failed(final, reason)
            elif self._config.checkpoint.async_save:
                self._save = save
                save.start()
            else:
                self._complete(save, save.write)
        return final

    def _plan(self, save: Save, model: TrainingModel, extra: dict[str, Any]) -> str | None:
        """Plan a save and bring its data to the host; the first rank's reason if that fails."""

        def collect() -> dict[str, Any]:
            random = rng.sharded_rng_state(with_data=True)
            return {**saved_state(model), rng.KEY: random, "extra": copy.deepcopy(extra)}

        state, reason = self._tried(collect)
        if state is None or reason is not None:
            return reason
        # Later saves have the structure of the first, which is checked in full.
        save.plan(state, self._is_checked)
        self._is_checked = True
        return self._tried(save.load)[1]

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
        return self._save is not None and self._agreement.all(self._save.is_written())

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
        if self._save is not None:
            self._save.kill()
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

    def _complete(self, save: Save, write: Callable[[], Written]) -> None:
        """Collect every rank's results, publish on rank 0, share the outcome."""
        written, reason = self._tried(write)
        parts = self._agreement.gather((save.num_bytes, written if reason is None else None))
        if self._is_first:
            if reason is None:
                try:
                    save.publish([part for _, part in parts])
                except Exception as error:  # the other ranks wait to hear of it
                    reason = _describe(error)
            if reason is not None:
                save.remove()
                if NO_SPACE in reason:
                    reason += _space_text(sum(size for size, _ in parts), self._staging)
        reason = self._agreement.from_first(reason)
        if self._uploads:
            shutil.rmtree(save.folder, ignore_errors=True)
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


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """Return the tokenizer files of a checkpoint by name; empty if the file is not a tokenizer."""
    # Read once, when a run begins: the file may be replaced while it trains.
    if not path.is_file():
        return {}
    try:
        Tokenizer.load(path)
    except ConfigError as error:
        logger.warning("checkpoints get no %s: %s", TOKENIZER_FILE, error)
        return {}
    files = {TOKENIZER_FILE: path.read_bytes()}
    # Only its name in the tokenizer distinguishes this token from others, and the data that say so
    # need not be there when the checkpoint is used.
    eod_token = named_eod_token(path)
    if eod_token is not None:
        files[TOKENIZER_CONFIG_FILE] = tokenizer_config(eod_token)
    template = path.with_name(CHAT_TEMPLATE_FILE)
    if template.is_file():
        files[CHAT_TEMPLATE_FILE] = template.read_bytes()
    return files


def _space_text(needed: int, folder: Path) -> str:
    """The needed and the free bytes, in brackets, for a message about a full disk."""
    try:
        free = show_bytes(free_bytes(folder))
    except OSError:
        return ""
    return f" ({show_bytes(needed)} needed, {free} free in {folder})"
