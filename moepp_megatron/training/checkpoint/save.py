"""One save of a checkpoint: planned by megatron-core, written by all ranks, published by rank 0.

megatron-core plans a save and hands out an asynchronous request. Its own ways to carry one out end
in collectives that hang all ranks when one rank cannot write, and hash every file on one rank while
training waits. So only the plan is taken: the bytes of each file, and the index that is to be
written when all files are there.

In a folder of this machine the checkpoint gets its name last. In object storage, where nothing can
be renamed, the ranks upload their files under its name, and the manifest, without which they are no
checkpoint, comes last.
"""

import contextlib
import gc
import json
import math
import queue
import shutil
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import StorageMeta

from moepp_megatron.file_names import (
    FORMAT_FILE,
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    TENSORS_FILE,
)
from moepp_megatron.runtime.atomic import exchange, sync, write_atomic, write_synced
from moepp_megatron.runtime.disk import write_error
from moepp_megatron.runtime.object_store import ObjectPath, StoreError
from moepp_megatron.runtime.patches import replace
from moepp_megatron.training.checkpoint.background import Background, BackgroundError
from moepp_megatron.training.checkpoint.files import SavedRecord, damage, file_digest, manifest
from moepp_megatron.training.checkpoint.find import checkpoint_dates
from moepp_megatron.training.checkpoint.retention import discard
from moepp_megatron.training.checkpoint.state import METADATA

# Between two checkpoints, where clocks do not show which one is newer.
_TICK_S = 1e-3


# One rank's output: results of torch's writer for the index, SHA-256 and bytes by file.
Written = tuple[list[Any], dict[str, tuple[str, int]]]


class Save:
    """A save in progress; every rank has one.

    It writes into `folder`, which exists, and is complete under the name `final`. `companions` are
    files stored with the tensors, by name: configuration, tokenizer. `record` is `state.json`.
    """

    def __init__(
        self, final: Path, folder: Path, companions: dict[str, bytes], record: SavedRecord
    ) -> None:
        self.final, self.folder = final, folder
        self._companions, self._record = companions, record
        self._buckets: Any = ()
        self._process: Background | None = None
        self._outcome: Background | Future[Any] | None = None
        self._failure = "no process was started"

    def plan(self, state: dict[str, Any], is_checked: bool = False) -> None:
        """Plan the files of `state`; every rank must call.

        The state may be changed again after `load` on a GPU; on a CPU after `write` or `start`.
        With `is_checked` a state of the same structure has been planned before.
        """
        # megatron-core would start a server process for a queue that nothing reads here.
        replace(filesystem_async, "_results_queue", queue.SimpleQueue())
        strategy = _PlanOnly()
        dist_checkpointing.save(
            state,
            str(self.folder),
            # Replicas share out the writing.
            FullyParallelSaveStrategyWrapper(
                strategy, parallel_state.get_data_parallel_group(with_context_parallel=True)
            ),
            validate_access_integrity=not is_checked,
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=dict(METADATA),
        )
        self._writer, self._metadata = strategy.writer, strategy.metadata

    def load(self) -> None:
        """Bring its data into host memory, which may not suffice; before all that follows."""
        # From a GPU to pinned host memory, all copies in flight at once.
        self._buckets = FileSystemWriterAsync.preload_tensors(
            self._writer.write_buckets, non_blocking=True
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's tensors and objects."""
        return sum(
            sum(len(data.getbuffer()) for _, data in objects)
            + sum(tensor.nbytes for _, tensor in tensors)
            for _, _, (objects, tensors) in self._buckets
        )

    def write(self) -> Written:
        """Write this rank's files, and upload them if the checkpoint is in object storage.

        OSError names the file that a disk refused; StoreError if the store does not take one.
        """
        return self._sent(self._write_files())

    def start(self) -> None:
        """Do the same in the background."""
        try:
            process = self._process = self._outcome = Background(self._write_files)
            if isinstance(self.final, ObjectPath):
                self._outcome = _in_thread(lambda: self._sent(process.result()))
        except OSError as error:
            self._failure = f"no process could be started ({error})"

    def is_written(self) -> bool:
        """True if the background has ended; does not block."""
        return self._outcome is None or self._outcome.done()

    def result(self) -> Written:
        """Wait for the background's result; BackgroundError or StoreError if it has failed."""
        if self._outcome is None:
            raise BackgroundError(self._failure)
        written: Written = self._outcome.result()
        return written

    def kill(self) -> None:
        """End the background now."""
        if self._process is not None:
            self._process.kill()

    def publish(self, written: list[Written]) -> None:
        """Write index, companions and checksums, name the folder, move `latest`; only on rank 0.

        An OSError leaves no checkpoint of that name, or the older one; a StoreError leaves none.
        """
        folder, final = self.folder, self.final
        files = {name: file for _, part in written for name, file in part.items()}
        sizes = {name: size for name, (_, size) in files.items()}
        if isinstance(final, ObjectPath):
            _check_uploaded(final, sizes)
        else:
            _check_shared(folder, sizes)
        self._write_index([results for results, _ in written])
        _make_newest(self._record, final.parent)
        contents = {
            STATE_FILE: self._record.to_json(),
            FORMAT_FILE: json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode(),
            **self._companions,
        }
        for name, content in contents.items():
            write_synced(folder / name, content)
        for name in (*contents, TENSORS_FILE):
            files[name] = _digest_and_size(folder / name)
        write_synced(folder / MANIFEST_FILE, manifest(files))
        latest = f"{final.name}\n".encode()
        if isinstance(final, ObjectPath):
            _upload(folder, final)
            (final.parent / LATEST_FILE).write_bytes(latest)
            return
        sync(folder)
        _give_name(folder, final)
        write_atomic(final.parent / LATEST_FILE, latest)
        sync(final.parent)

    def remove(self) -> None:
        """Remove what a failed save has left, as far as that can be done now; only on rank 0."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(self.final, ObjectPath):
            # The next save, or the next start, tries again.
            with contextlib.suppress(StoreError):
                self.final.delete_below(MANIFEST_FILE)

    def _write_files(self) -> Written:
        """Write this rank's files and force them to disk. May run in a forked process."""
        written, files = list[Any](), {}
        for number, bucket in enumerate(self._buckets):
            _, results = FileSystemWriterAsync.write_preloaded_data(
                [self._writer.transforms], number, bucket, None, None, use_fsync=True
            )
            path = Path(bucket[0])
            if isinstance(results, Exception):
                refused = write_error(results, path)
                _free(results)
                raise refused
            written += results
            files[path.name] = _digest_and_size(path)
        return written, files

    def _sent(self, written: Written) -> Written:
        if isinstance(self.final, ObjectPath):
            for name in written[1]:
                (self.final / name).upload(self.folder / name)
                (self.folder / name).unlink()
        return written

    def _write_index(self, results: list[list[Any]]) -> None:
        # Plans of all ranks, for reuse by megatron-core; they would be half of the file.
        self._metadata.__dict__.pop("all_local_plans", None)
        # torch would store the path written to, as an object: Python 3.12 cannot unpickle a path of
        # Python 3.13, and nobody reads it.
        meta = StorageMeta(save_id=self._writer.save_id)
        replace(self._writer, "storage_meta", lambda: meta)
        self._writer.finish(self._metadata, results)


def _digest_and_size(path: Path) -> tuple[str, int]:
    return file_digest(path), path.stat().st_size


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Keeps the plan instead of making a request of it."""

    writer: FileSystemWriterAsync
    metadata: Any

    def _get_save_and_finalize_callbacks(
        self, writer: Any, save_state_dict_ret: Any, async_strategy: str
    ) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def _free(error: BaseException) -> None:
    """Free the streams that a failed write has left, without their error messages."""
    # Torch's streams flush when they are collected. Their file is closed by then, which Python
    # reports on stderr, with a traceback for each.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link.__traceback__ = None
            link = link.__context__
        gc.collect()
    finally:
        sys.unraisablehook = hook


def _check_uploaded(final: ObjectPath, sizes: dict[str, int]) -> None:
    """Compare sizes of what the store has; the checksums were its own to compare."""
    there = {path.name: path.stat().st_size for path in final.iterdir()}
    for name, size in sizes.items():
        if there.get(name) != size:
            got = f"{there[name]} bytes" if name in there else "nothing"
            raise StoreError(f"{final / name} was uploaded with {size} bytes, and {got} is there")


def _make_newest(record: SavedRecord, folder: Path) -> None:
    """Date a checkpoint after all others, since a machine's clock may have been ahead."""
    others = [date + _TICK_S for date in checkpoint_dates(folder).values() if math.isfinite(date)]
    record.saved_at = max([record.saved_at, *others])


def _check_shared(folder: Path, sizes: dict[str, int]) -> None:
    """Check that every rank's files are seen here."""
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise OSError(
                f"{path} was written by another rank and is not here; checkpoint.dir must be a "
                "folder that all nodes share"
            )


def _upload(folder: Path, final: ObjectPath) -> None:
    """Upload what only rank 0 has written, the manifest last."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    del sizes[MANIFEST_FILE]
    for name in sizes:
        (final / name).upload(folder / name)
    _check_uploaded(final, sizes)
    (final / MANIFEST_FILE).upload(folder / MANIFEST_FILE)


def _give_name(folder: Path, final: Path) -> None:
    """Rename; an older checkpoint of that name goes if it is whole, and is kept aside if not."""
    token = folder.name.rpartition("-")[2]
    if final.exists():
        if damage(final) is not None:
            final.rename(final.with_name(f"{final.name}.unreadable-{token}"))
        elif exchange(folder, final):
            # At no moment is there no checkpoint of that name.
            shutil.rmtree(folder)
            return
        else:
            discard(final, token)
    folder.rename(final)


def _in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Run `function`, an upload, in a thread, which ends with the process at the latest."""
    # Not in a process: a network client does not survive a fork, and mostly waits for the network.
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # the rank, which asks for the result, gets it
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint upload", daemon=True).start()
    return future
