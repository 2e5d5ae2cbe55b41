"""Plays training steps on a GPU that is not there.

    python -m tests.fake_gpu.play [SOURCE] < cases.json

The last line printed is the outcomes as JSON. SOURCE is the unpacked source of Transformer Engine's
part for torch, whose Python the path has.

Started by `build.play`, which puts the stub of the CUDA runtime before it.
"""

import gc
import json
import sys
import tempfile
import traceback
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from moepp_megatron.config import UnfitError
from tests.fake_gpu import answers, collectives, machine
from tests.fake_gpu.engine import extension
from tests.fake_gpu.memory import MEMORY
from tests.fake_gpu.record import RECORD, ROUTING


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        config: YAML file, from the root.
        overrides: Settings over it; two layers and micro-batches of one sequence unless given.
        world_size: Ranks of the layout.
        rank: The one that is played.
        parts: What else is played: guard, between the steps evaluation, after them health and save.
    """

    config: str
    overrides: list[str] = field(default_factory=list)
    world_size: int = 1
    rank: int = 0
    parts: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """The outcome of a case.

    Attributes:
        error: Traceback; empty if there was none.
        refused: Why the configuration is not for this machine, as a user is told.
        faults: `record.Record.faults`.
        reads: Reads of one step, the second one.
        launches: Triton kernels of it.
        kernels: Kernels of its forward and backward passes. The optimizer's are left out: torch
            has them one by one for fake tensors.
        owners: The same by whose code starts them (`record.owner`).
        modules: Names of what computes attention and experts.
        layers: MoE layers of the rank, times micro-batches.
        held: Bytes of tensors before that step: weights, gradients, optimizer.
        peak: The most bytes of tensors within it.
        parts: The largest tensors at about the peak: bytes by shape and dtype.
        saved: Bytes that a save would write on the rank.
        parameters: Parameters of the rank.
    """

    error: str = ""
    refused: str = ""
    faults: list[str] = field(default_factory=list)
    reads: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    kernels: int = 0
    owners: dict[str, int] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    layers: int = 0
    held: int = 0
    peak: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    saved: int = 0
    parameters: int = 0


def main():
    machine.install()
    collectives.install()
    if len(sys.argv) > 1:
        extension.install(Path(sys.argv[1]))
    import moepp_megatron.model.build
    import moepp_megatron.training.trainer  # noqa: F401

    machine.keep_dtypes()
    # A collection before each step would walk all that is imported, a tenth of the time.
    gc.freeze()
    outcomes = [asdict(_played(Case(**fields))) for fields in json.loads(sys.stdin.read())]
    print(json.dumps(outcomes))


def _played(case):
    outcome = Outcome()
    RECORD.clear()
    RECORD.faults.clear()
    MEMORY.forget()
    try:
        _play(case, outcome)
    except UnfitError as error:
        outcome.refused = str(error)
    except Exception:
        outcome.error = traceback.format_exc()
    finally:
        _leave()
    outcome.faults = list(RECORD.faults)
    return outcome


def _leave():
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state._GLOBAL_MEMORY_BUFFER = None
    if dist.is_initialized():
        dist.destroy_process_group()
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.cuda_graphs import _set_capture_end
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from moepp_megatron.moe import capacity

    # A case that fails within a capture leaves it open.
    _set_capture_end()
    # Graphs need another kind.
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    # Has as many layers as the first model.
    get_moe_metrics_tracker().metrics.clear()
    PipelineOffloadManager.OFFLOAD_MGR = None
    # Fake tensors belong to their mode.
    capacity._capacity_limits.cache_clear()
    extension.forget_tensors()


def _play(case, outcome):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from moepp_megatron.config import Layout, load_config
    from moepp_megatron.runtime import cpu_support, distributed, fit
    from moepp_megatron.runtime.optional import quiet
    from moepp_megatron.tools.planning.traffic import distinct_targets

    quiet()
    small = ["model.num_layers=2", "training.micro_batch_size=1", "data.path=none", "run.dir=none"]
    config = load_config(Path(case.config), [*small, *case.overrides])
    layout = Layout.from_config(config, case.world_size)
    assert not cpu_support.install(), "there is no GPU to play on"
    answers.answer_checks()
    fit.check_fit(config)
    torch.cuda.set_device(0)
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.world_size)
    distributed.build_groups(config, layout)
    answers.answer_megatron()
    tokens = config.model.seq_length * config.training.micro_batch_size
    tokens //= layout.cp * (layout.tp if config.parallel.uses_sequence_parallel else 1)
    moe = config.moe
    ROUTING.tokens, ROUTING.experts, ROUTING.ranks = tokens, moe.num_ffn_experts, layout.ep
    ROUTING.sources = layout.ep * layout.etp
    ROUTING.reached = distinct_targets(layout.ep, moe.router_topk * moe.ffn_share, ROUTING.experts)
    ROUTING.gathers = moe.dispatcher in ("allgather", "flex")
    ROUTING.share = moe.router_topk * moe.ffn_share / moe.num_ffn_experts
    with answers.graphs() if config.training.cuda_graphs else nullcontext(), machine.fake_mode():
        _Run(config, layout, case, outcome).play()


class _Run:
    """One configuration, built and played inside the modes."""

    def __init__(self, config, layout, case, outcome):
        from megatron.core.optimizer.optimizer import SEPARATE_GRAD_NORM_GROUPS

        from moepp_megatron.model.build import _build_chunks
        from moepp_megatron.training import setup
        from moepp_megatron.training.optimizers import build_optimizer
        from moepp_megatron.training.schedule import build_schedule

        self.config, self.layout, self.case, self.outcome = config, layout, case, outcome
        setup._start_a_kernel()
        setup._replace_l2_norm()
        with torch.device("cuda"):
            models = _build_chunks(config)
        answers.restore_orders(models)
        schedule_config, chunks = setup._wrap_models(models, config)
        optimizer = build_optimizer(config, chunks)
        # megatron-core asks all ranks once, and the answer is a number.
        optimizer._has_grad_norm_group_cache = dict.fromkeys(SEPARATE_GRAD_NORM_GROUPS, False)
        setup._connect_schedule(schedule_config, config, chunks, optimizer)
        schedule = build_schedule(config, optimizer)
        self.model = setup.TrainingModel(chunks, models, optimizer, schedule)
        self.model.set_training(True)
        outcome.parameters = sum(p.numel() for model in models for p in model.parameters())
        outcome.modules = sorted(
            {
                type(module).__name__
                for model in models
                for name, module in model.named_modules()
                if name.endswith(("mlp.experts", "core_attention"))
            }
        )

    def batches(self, *args):
        """One iterator a chunk over micro-batches of this rank's part of the sequences."""
        from moepp_megatron.runtime import optional

        config = self.config
        shape = (config.training.micro_batch_size, config.model.seq_length // self.layout.cp)
        whole = {name: torch.zeros(shape, dtype=torch.long, device="cuda") for name in _INPUTS}
        whole["loss_mask"] = torch.ones(shape, device="cuda")
        if config.data.reset_attention_mask and optional.have_transformer_engine():
            # Ends of documents; local modules get a mask of all pairs.
            whole["attention_mask"] = torch.zeros(9, dtype=torch.int32, device="cuda")

        def endless():
            while True:
                yield dict(whole)

        return [endless() for _ in self.model.chunks]

    def _planted(self, fault):
        """Every router leaves a tensor on the host, or reads one from the device."""
        from moepp_megatron.moe.router import MoEPPRouter

        forward = MoEPPRouter.forward

        def faulty(router, hidden, *args, **kwargs):
            if fault == "plant":
                hidden = hidden + torch.ones(hidden.shape[-1])
            else:
                float(hidden.sum())
            return forward(router, hidden, *args, **kwargs)

        return mock.patch.object(MoEPPRouter, "forward", faulty)

    def play(self):
        with ExitStack() as stack:
            for part in self.case.parts:
                if part.startswith("plant"):
                    stack.enter_context(self._planted(part))
            self._steps()

    def _steps(self):
        import numpy as np

        from moepp_megatron.features.guard import part as routing_guard
        from moepp_megatron.features.static_rows import part as static_rows
        from moepp_megatron.features.tokens import part as token_groups
        from moepp_megatron.training import step as step_module
        from moepp_megatron.training.checkpoint.files import Progress
        from moepp_megatron.training.part import Step
        from moepp_megatron.training.signals import StopRequest
        from moepp_megatron.training.step import training_step
        from moepp_megatron.training.step_sums import mean_loss
        from tests.parallel.training_runs import counting_parts

        config, parts = self.config, self.case.parts
        # There is no training set to count.
        token_groups._counts_on_ranks = lambda dataset, size: np.arange(size, 0, -1)
        # Nor are there other ranks' processes, for gloo to find.
        routing_guard.Agreement = lambda: None
        watching = counting_parts(config, self.layout, self.model, None, guarded="guard" in parts)
        # Nor has what is read numbers: rows have room.
        static_rows.StaticRowsPart.take_sum = lambda part, total: None
        stop = StopRequest()
        prepare = step_module.prepare_gradients

        def prepared(optimizer):
            self.outcome.kernels = RECORD.kernels
            self.outcome.owners = dict(RECORD.owners)
            return prepare(optimizer)

        step_module.prepare_gradients = prepared
        for step in (1, 2):
            RECORD.clear()
            gc.collect()
            self.outcome.held = MEMORY.live
            MEMORY.begin()
            watching.begin_step(step, self.layout)
            result = training_step(
                self.model, self.batches(), config, self.layout, watching, [stop]
            )
            taken = Step(Progress(step), 0, 1, 0.0, result)
            watching.end_step(taken)
            if step == 1 and "evaluation" in parts:
                self._evaluate()
        self.outcome.peak, self.outcome.parts = MEMORY.peak, MEMORY.parts
        self.outcome.reads = dict(RECORD.reads)
        self.outcome.launches = dict(RECORD.launches)
        step_module.prepare_gradients = prepare
        layers = sum(map(_moe_layers, self.model.models))
        self.outcome.layers = layers * self.layout.num_microbatches
        mean_loss(result.losses)
        if "health" in parts:
            watching.record(taken, {})
        if "save" in parts:
            self._plan_save()

    def _plan_save(self):
        """A save as far as all that it writes is in host memory."""
        from moepp_megatron.training.checkpoint.files import Progress, SavedRecord
        from moepp_megatron.training.checkpoint.save import Save
        from moepp_megatron.training.checkpoint.state import saved_state

        with tempfile.TemporaryDirectory() as folder:
            path, record = Path(folder), SavedRecord.now(Progress(), self.layout)
            save = Save(path, path, {}, record)
            save.plan(saved_state(self.model))
            save.load()
            self.outcome.saved = save.num_bytes

    def _evaluate(self):
        from moepp_megatron.features.validation import part as evaluate

        evaluate.rank_batches = self.batches
        evaluate.validation_loss(self.model, None, self.config, self.layout)


_INPUTS = ("tokens", "labels", "position_ids")


def _moe_layers(model):
    """Those of MoE++, and megatron-core's own of a vanilla model."""
    from megatron.core.transformer.moe.moe_layer import BaseMoELayer

    return sum(isinstance(module, BaseMoELayer) for module in model.modules())


if __name__ == "__main__":
    main()
