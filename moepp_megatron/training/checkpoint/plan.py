"""Plans with megatron-core the bytes that each rank writes, and writes them itself.

megatron-core plans a save and hands out an asynchronous request. Its own ways to carry one out end
in collectives that hang all ranks when one rank cannot write, and hash every file on one rank while
training waits. So only the plan is taken: the bytes of each file, and the index that is to be
written when all files are there.
"""

from __future__ import annotations

import gc
import queue
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import StorageMeta

from moepp_megatron.runtime.disk import write_error
from moepp_megatron.runtime.patches import replace
from moepp_megatron.training.checkpoint.files import file_digest
from moepp_megatron.training.checkpoint.state import METADATA


@dataclass
class Written:
    """One rank's output: results of torch's writer for the index, SHA-256 and bytes by file."""

    results: list[Any] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)


class SavePlan:
    """A planned save into `folder`."""

    def __init__(self, folder: Path, writer: FileSystemWriterAsync, metadata: Any) -> None:
        self.folder = folder
        self._writer = writer
        self._metadata = metadata
        self._buckets: Any = ()

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
        """Write this rank's files and force them to disk. May run in a forked process.

        Raises:
            OSError: The disk is full, read-only or gone; names the file.
        """
        written = Written()
        for number, bucket in enumerate(self._buckets):
            _, results = FileSystemWriterAsync.write_preloaded_data(
                [self._writer.transforms], number, bucket, None, None, use_fsync=True
            )
            path = Path(bucket[0])
            if isinstance(results, Exception):
                refused = write_error(results, path)
                _free(results)
                raise refused
            written.results += results
            written.digests[path.name] = file_digest(path)
            written.sizes[path.name] = path.stat().st_size
        return written

    def write_index(self, results: list[list[Any]]) -> None:
        """Write `.metadata` from what all ranks wrote; only on rank 0."""
        # Plans of all ranks, for reuse by megatron-core; they would be half of the file.
        self._metadata.__dict__.pop("all_local_plans", None)
        # torch would store the path written to, as an object: Python 3.12 cannot unpickle a path of
        # Python 3.13, and nobody reads it.
        meta = StorageMeta(save_id=self._writer.save_id)
        replace(self._writer, "storage_meta", lambda: meta)
        self._writer.finish(self._metadata, results)


class Planner:
    """Plans the saves of a run. The first is checked in full: later ones have its structure."""

    def __init__(self) -> None:
        self._is_checked = False

    def plan(self, state: dict[str, Any], folder: Path) -> SavePlan:
        """Plan the save of `state` into `folder`, which exists; every rank must call.

        The state may be changed again once the plan is loaded on a GPU; on a CPU once it has been
        written, or a process that writes it has been forked.
        """
        # megatron-core would start a server process for a queue that nothing reads here.
        replace(filesystem_async, "_results_queue", queue.SimpleQueue())
        strategy = _PlanOnly()
        dist_checkpointing.save(
            state,
            str(folder),
            # Replicas share out the writing.
            FullyParallelSaveStrategyWrapper(
                strategy, parallel_state.get_data_parallel_group(with_context_parallel=True)
            ),
            validate_access_integrity=not self._is_checked,
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=dict(METADATA),
        )
        self._is_checked = True
        return SavePlan(folder, strategy.writer, strategy.metadata)


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
