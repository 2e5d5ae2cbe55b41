"""Writes the experts that tokens take to files, and lets routers repeat those of files."""

import hashlib
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moepp_megatron.config import ConfigError, Layout
from moepp_megatron.data.npz import read_arrays
from moepp_megatron.moe.replay import checked_routes, drive_routers
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.runtime.disk import write_error
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.training.batches import sample_index
from moepp_megatron.training.part import Outcome, Part, PartContext, Step, Stop
from moepp_megatron.training.run_folder.ownership import check_kind
from moepp_megatron.training.schedule import BatchSizes
from moepp_megatron.training.step import Batch, Batches

logger = logging.getLogger(__name__)

# In a micro-batch: [b, s] int64 place of each token in the global batch.
_ROWS = "rows"
# In a file: whole numbers [tokens, MoE layers, K].
_EXPERTS = "routed_experts"
# There too, if a run has written it: the digest of the batch's tokens.
_DIGEST = "tokens_sha256"


class RoutesPart(Part):
    """The routes of a run; its construction hooks into the model's chunks."""

    def __init__(self, run: PartContext) -> None:
        self._config, self._settings = run.config, run.config.routes
        self._train_set, self._sizes = run.train_set, BatchSizes(run.config)
        self._pattern = run.config.moe.moe_layer_pattern(run.config.model.num_layers)
        self._layers = [number for number, is_moe in enumerate(self._pattern, 1) if is_moe]
        self._last = run.progress.step + (self._settings.steps or run.config.training.train_iters)
        # Files are of batches: a refused one, or those before a rollback, are no step's.
        self._first_sample = run.progress.consumed_samples
        self._agreement = Agreement()
        self._writes = False
        # [tokens, MoE layers, K] of the step; [T] places of the tokens that pass next.
        self._given: Tensor | None = None
        self._rows: Tensor | None = None
        # Layer, places and experts [T, K] of each micro-batch, where they are written.
        self._seen: list[tuple[int, Tensor, Tensor]] = []
        self._replays = [
            replay
            for chunk in run.model.models
            for replay in drive_routers(chunk, self._routes_of, self._take)
        ]
        # Why the last batch's routes are not written, on rank 0.
        self._failure: str | None = None
        self._warned = False
        if (folder := self._settings.record) is not None:
            check_kind(Path(folder), "folder", "routes.record")
            Path(folder).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def is_wanted(run: PartContext) -> bool:
        """True if routes are recorded or repeated."""
        return run.config.routes.enabled

    def begin_step(self, step: int, layout: Layout) -> None:
        """Read the routes of a batch."""
        self._forget_seen()
        self._writes = self._settings.record is not None and step <= self._last
        if self._settings.replay is not None and self._given is None:
            reason = self._agreement.first_reason(self._read(self._settings.replay))
            if reason is not None:
                raise ConfigError(reason)

    def _read(self, folder: str) -> str | None:
        """Read the next batch's routes; return why they do not fit, if so."""
        path = self._file(folder)
        try:
            arrays = read_arrays(path, _EXPERTS, _DIGEST)
            digest = str(arrays[_DIGEST]) if _DIGEST in arrays else None
            length = self._config.model.seq_length
            given = checked_routes(
                arrays[_EXPERTS],
                self._num_samples * length,
                self._pattern,
                self._config.moe,
                is_own=digest is not None,
            )
        except (OSError, ValueError) as error:
            return (
                f"routes.replay ({path}) must be an npz file with this batch's {_EXPERTS}: "
                f"{' '.join(str(error).split())}"
            )
        self._given = torch.from_numpy(given)
        if dist.get_rank() != 0:
            return None
        if digest is None and not self._warned:
            # Engines give none.
            logger.warning("%s has no %s: its routes may be of other tokens", path, _DIGEST)
            self._warned = True
        if digest not in (None, self._digest()):
            return (
                f"routes.replay ({path}) must be of this batch's tokens, and was recorded with "
                "others; take the seed, the order and the data of the recorded run"
            )
        return None

    @property
    def _num_samples(self) -> int:
        """Sequences of the batch, over all ranks."""
        return self._sizes.at(self._first_sample)

    def _digest(self) -> str:
        """SHA-256 of the batch's tokens (int64), sample by sample."""
        digest = hashlib.sha256()
        for number in range(self._first_sample, self._first_sample + self._num_samples):
            sample = self._train_set[sample_index(self._train_set, number, self._config)]
            digest.update(np.asarray(sample["tokens"]).astype("<i8").tobytes())
        return digest.hexdigest()

    def batches(self, batches: Batches, num_microbatches: int) -> Batches:
        """The micro-batches with their tokens' places."""
        return [self._placed(iterator) for iterator in batches]

    def _placed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        length, size = self._config.model.seq_length, self._config.training.micro_batch_size
        replica = parallel_state.get_data_parallel_rank()
        replicas = parallel_state.get_data_parallel_world_size()
        group, device = parallel_state.get_context_parallel_group(), torch.cuda.current_device()
        for index, batch in enumerate(batches):
            # The order of `data/loader.py`.
            first = (index * replicas + replica) * size * length
            rows = torch.arange(first, first + size * length, device=device).view(size, length)
            yield batch | get_batch_on_this_cp_rank(
                {_ROWS: rows}, is_hybrid_cp=False, cp_group=group
            )

    def arguments(self, batch: Batch) -> Mapping[str, Any]:
        """Note the tokens that the next forward pass is over."""
        rows = batch[_ROWS].T
        if self._config.parallel.uses_sequence_parallel:
            size = parallel_state.get_tensor_model_parallel_world_size()
            rows = rows.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]
        self._rows = rows.reshape(-1).cpu()
        return {}

    def _routes_of(self, number: int) -> Tensor | None:
        # None in passes that are not the step's, such as validation.
        if self._given is None or self._rows is None:
            return None
        # On the CPU: megatron-core keeps those of all micro-batches until the step ends.
        return self._given[self._rows, self._layers.index(number)]

    def _take(self, number: int, experts: Tensor) -> None:
        if self._writes and self._rows is not None:
            self._seen.append((number, self._rows, experts.to(torch.int16)))

    def end_step(self, step: Step) -> Iterable[Alert]:
        """Write what was taken; a collective where it is recorded."""
        if self._writes and self._settings.record is not None:
            self._write(self._file(self._settings.record))
        self._first_sample += step.samples
        self._rows = self._given = None
        self._forget_seen()
        return ()

    def _forget_seen(self) -> None:
        self._seen.clear()
        for replay in self._replays:
            replay.clear_indices()
            replay.clear_router_replay_action()

    def judge(self, step: Step) -> Iterator[Outcome]:
        """Save and end the run where routes were not written, or the next batch has none."""
        reason, folder = self._failure, self._settings.replay
        if folder is not None and step.number < self._config.training.train_iters:
            reason = reason or self._read(folder)
        if folder is not None or self._settings.record is not None:
            # What ranks see differs.
            reason = self._agreement.first_reason(reason)
        if reason is not None:
            yield Stop(lambda saved: ConfigError(f"{reason}; {saved}"))

    def _write(self, path: Path) -> None:
        """Bring the routes of all ranks together and write them on rank 0."""
        layers, num_tokens = [], self._num_samples * self._config.model.seq_length
        for number in self._layers:
            shape = num_tokens, self._config.moe.router_topk
            routes = torch.zeros(shape, dtype=torch.int32, device=torch.cuda.current_device())
            for layer, rows, experts in self._seen:
                if layer == number:
                    routes[rows.to(routes.device)] = experts.to(routes)
            dist.all_reduce(routes)
            layers.append(routes.to("cpu", torch.int16))
        if dist.get_rank() == 0:
            stream = io.BytesIO()
            routes = torch.stack(layers, dim=1)
            np.savez(stream, routed_experts=routes.numpy(), tokens_sha256=self._digest())
            try:
                write_atomic(path, stream.getvalue())
            except OSError as error:
                self._failure = f"routes.record: {write_error(error, path)}"

    def _file(self, folder: str) -> Path:
        """The batch's file."""
        return Path(folder) / f"from_sample_{self._first_sample:08d}.npz"
