"""Records `training.profile_steps` of `training.profile_ranks` to `RUN/profile`.

`rank<k>.pt.trace.json.gz` is torch's chrome trace, `rank<k>.meta.json` what it does not say:
layout, nodes, clock, and the routing of each step. A rank that is not recorded counts nothing; it
only meets the others at the barriers.
"""

import functools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moepp_megatron.config import Config, Layout
from moepp_megatron.features.profile.ranges import Ranges, range_
from moepp_megatron.observe.alerts import Alert
from moepp_megatron.runtime.atomic import whole_file, write_atomic
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.training import step as step_module
from moepp_megatron.training.part import Part, PartContext, Step
from moepp_megatron.training.setup import TrainingModel

_FORMAT = 1

logger = logging.getLogger(__name__)


class ProfilePart(Part):
    """Records the steps that the configuration names."""

    def __init__(self, config: Config, layout: Layout, model: TrainingModel) -> None:
        self._config, self._layout, self._model = config, layout, model
        self._steps = frozenset(config.training.profile_steps)
        ranks = config.training.profile_ranks
        self._records_here = ranks is None or dist.get_rank() in ranks
        self._ranges, self._traffic = Ranges(), _TrafficCounter()
        self._profile: profile | None = None
        self._step: AbstractContextManager[None] | None = None
        self._about: dict[str, Any] = {}
        self._done = not self._steps

    @classmethod
    def of(cls, run: PartContext) -> "ProfilePart | None":
        """The part of a run; None where no step is recorded."""
        if not run.config.training.profile_steps:
            return None
        return cls(run.config, run.layout, run.model)

    def begin_step(self, step: int, layout: Layout) -> None:
        """Start or end the recording if it is due before `step`; a collective."""
        if self._done:
            return
        if step not in self._steps:
            if step > max(self._steps):
                self.end()
            return
        if not self._about:
            self._start()
        if self._profile is not None:
            self._traffic.take()
            self._about["steps"].append({"step": step})
            self._step = range_(f"step/{step}")
            self._step.__enter__()

    def end_step(self, step: Step) -> Iterable[Alert]:
        """End the step; what follows (metrics, validation, saving) is not part of it."""
        self._end_step()
        return ()

    def _end_step(self) -> None:
        if self._step is None:
            return
        if torch.cuda.is_available():
            # The kernels of the step belong into it.
            torch.cuda.synchronize()
        self._step.__exit__(None, None, None)
        self._step = None
        self._about["steps"][-1]["passes"] = self._traffic.take()

    def end(self) -> None:
        """End the recording, if there is one, and write it."""
        if self._profile is None or self._done:
            return
        self._done = True
        self._end_step()
        self._ranges.undo()
        self._profile.__exit__(None, None, None)
        try:
            self._write(self._profile)
        except OSError as error:
            # A full disk must not end a run that only wanted to be looked at.
            logger.error("%s: the profile is not written (%s)", self._folder, error)
        self._profile = None

    @property
    def _folder(self) -> Path:
        return Path(self._config.run.dir) / "profile"

    def _start(self) -> None:
        self._about = _describe(self._config, self._layout)
        if self._records_here:
            # Its library announces every start, and on a CPU that there is no GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            with profile(activities=_activities()):
                pass  # The first one takes time to start, which is no step's.
        self._about["clock"] = {"barrier_unix_ns": _clock_at_barriers()}
        if not self._records_here:
            return
        self._put_ranges()
        # Stacks and memory would cost more than the steps themselves.
        self._profile = profile(activities=_activities(), record_shapes=True)
        self._profile.__enter__()

    def _put_ranges(self) -> None:
        ranges, model = self._ranges, self._model
        for chunk in model.models:
            ranges.name_layers(chunk)
            self._traffic.watch(ranges, chunk)
        for chunk in model.chunks:
            ranges.around(chunk, "forward", "forward")
            ranges.around(chunk, "start_param_sync", "parameter_gather")
            ranges.around(chunk, "finish_grad_sync", "gradient_reduce")
        config = model.chunks[0].config
        if config.finalize_model_grads_func is not None:
            ranges.around(config, "finalize_model_grads_func", "gradients")
        # Functions of a module are its attributes too.
        ranges.around(step_module, "prepare_gradients", "optimizer")
        ranges.around(model.optimizer, "step", "optimizer")
        ranges.name_collectives()

    def _write(self, recorded: profile) -> None:
        rank = dist.get_rank()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"rank{rank}.pt.trace.json.gz"
        with whole_file(trace) as temporary:
            recorded.export_chrome_trace(str(temporary))
        about = json.dumps(self._about).encode("ascii")
        write_atomic(self._folder / f"rank{rank}.meta.json", about)
        if rank == 0:
            logger.info("profile of steps %s: %s", sorted(self._steps), self._folder)


def _activities() -> list[ProfilerActivity]:
    activities = [ProfilerActivity.CPU]
    return [*activities, ProfilerActivity.CUDA] if torch.cuda.is_available() else activities


def _describe(config: Config, layout: Layout) -> dict[str, Any]:
    """Describe the run and this node, for JSON; a collective."""
    return {
        "format": _FORMAT,
        "name": config.run.name,
        "world_size": dist.get_world_size(),
        "node": socket.gethostname(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "layout": asdict(layout),
        "dispatcher": config.moe.dispatcher,
        "nodes": gathered(socket.gethostname()),
        "steps": [],
    }


def _clock_at_barriers() -> list[int]:
    """Unix time [ns] on this node when ranks leave a barrier together; all ranks must call."""
    times = []
    for _ in range(5):
        dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.time_ns())
    return times


class _TrafficCounter:
    """Counts a model's layers while `Ranges` hold its methods; `passes` are not yet taken."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []

    def watch(self, ranges: Ranges, model: torch.nn.Module) -> None:
        """Count every pass through the MoE layers of a model."""
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                wrapper = functools.partial(self._counted, layer)
                ranges.replace(layer.token_dispatcher, "dispatch_preprocess", wrapper)

    def take(self) -> list[dict[str, Any]]:
        """Return the counts and reset them."""
        passes, self.passes = self.passes, []
        return passes

    def _counted(self, layer: MoELayer, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> Any:
            self.passes.append(_traffic(layer, hidden_states, routing_map))
            return function(hidden_states, routing_map, probs)

        return inner


@torch.no_grad()
def _traffic(layer: MoELayer, hidden: Tensor, routing_map: Tensor) -> dict[str, Any]:
    """Counts of one forward pass of a layer on one rank (`tools.profiling.trace.Pass`)."""
    # hidden: [s, b, D] local tokens.
    # routing_map: [T, F] bool. Padding looks like tokens that need no FFN expert; training by this
    # package has none.
    ranks = layer.ep_group.size()
    by_rank = routing_map.view(routing_map.shape[0], ranks, -1)
    return {
        "layer": int(layer.layer_number or 0),
        # Autograd runs a recomputed forward pass inside of a node of its graph.
        "recomputed": torch._C._current_autograd_node() is not None,
        "dispatcher": type(layer.token_dispatcher).__name__,
        "tokens": routing_map.shape[0],
        "topk": int(layer.config.moe_router_topk),
        "row_bytes": hidden.shape[-1] * hidden.element_size(),
        "ranks": ranks,
        "to_ranks": by_rank.sum(dim=(0, 2)).tolist(),
        "copies_to_ranks": by_rank.any(dim=2).sum(dim=0).tolist(),
        "own": layer.ep_group.rank(),
    }
