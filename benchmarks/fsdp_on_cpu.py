"""Tries megatron-core's FSDP with MoE++ layers on CPU ranks, and prints what comes of it.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.fsdp_on_cpu

The same small model trains a few steps with the wrapper of the trainer and then with
`FullyShardedDataParallel`: as it is, and with what it needs besides on a CPU (`CpuFSDP`), in each
of its sharding strategies. Printed is how far losses and gradient norms differ, or the line that
fails. docs/fsdp.md says what follows.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh

from benchmarks.fresh_ranks import forget_model
from moepp_megatron.config import Config, Layout, parse_config, with_overrides
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.runtime.rank import RankEnvironment

STEPS = 3
STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")
CONFIG: dict[str, dict[str, Any]] = {
    "run": {"dir": "unused"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "seq_length": 16,
        "vocab_size": 64,
        "init_method_std": 0.2,
    },
    "moe": {"num_ffn_experts": 4},
    "parallel": {"use_distributed_optimizer": True},
    "optimizer": {"lr": 1.0e-3},
    "training": {"train_iters": 10, "global_batch_size": 8, "micro_batch_size": 2, "seed": 7},
}
# Losses and gradient norms, step by step.
Course = list[tuple[float, float]]


def batches(config: Config) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this rank, the same for every model."""
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    shape = (config.training.micro_batch_size, config.model.seq_length)
    while True:
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        yield {
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "loss_mask": torch.ones(shape),
            "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        }


def train(config: Config, wrap: Callable[[Any, Any], Any] | None) -> Course:
    """A few steps.

    Args:
        config: The configuration.
        wrap: Wraps a model chunk, given it and the schedules' configuration; by default as the
            trainer does.
    """
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from moepp_megatron.model.build import build_model
    from moepp_megatron.model.megatron_config import moepp_config
    from moepp_megatron.moe.lane import pipeline_config
    from moepp_megatron.training.collect import mean_loss
    from moepp_megatron.training.optimizers import _optimizer_config
    from moepp_megatron.training.setup import wrap_models
    from moepp_megatron.training.step import _forward_step

    layout = Layout.from_config(config, dist.get_world_size())
    distributed.build_groups(config, layout)
    models = build_model(config)
    if wrap is None:
        schedule_config, chunks = wrap_models(models, config)
    else:
        schedule_config = pipeline_config(models[0].config, moepp_config(config))
        chunks = [wrap(model, schedule_config) for model in models]
    optimizer = get_megatron_optimizer(
        _optimizer_config(config), chunks, use_gloo_process_groups=False
    )
    schedule_config.grad_scale_func = optimizer.scale_loss
    schedule_config.finalize_model_grads_func = finalize_model_grads
    iterator, course = batches(config), []
    for _ in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterator,
            model=chunks,
            num_microbatches=layout.num_microbatches,
            seq_length=config.model.seq_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        loss = mean_loss(torch.stack([entry["loss"] for entry in reduced]).sum(dim=0))
        course.append((loss, float(grad_norm)))
    return course


def settings(strategy: str) -> Any:
    """The settings of the wrapper, otherwise as the trainer has them."""
    from megatron.core.distributed import DistributedDataParallelConfig

    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        use_megatron_fsdp=True,
        data_parallel_sharding_strategy=strategy,
    )


def as_it_is(strategy: str) -> Callable[[Any, Any], Any]:
    """FSDP without any help."""

    def wrap(model: Any, config: Any) -> Any:
        from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel

        return FullyShardedDataParallel(config, settings(strategy), model)

    return wrap


def on_cpu(strategy: str) -> Callable[[Any, Any], Any]:
    """FSDP with what it needs on a CPU."""

    def wrap(model: Any, config: Any) -> Any:
        from megatron.core import parallel_state
        from megatron.core.distributed.fsdp.mcore_fsdp_adapter import (
            FSDPDistributedIndex,
            FullyShardedDataParallel,
        )

        def mesh(data: Any, tensor: Any) -> DeviceMesh:
            ranks = [[rank] for rank in dist.get_process_group_ranks(data)]
            names = ("dp_cp", "tp")
            return DeviceMesh.from_group([data, tensor], "cpu", ranks, mesh_dim_names=names)

        class CpuFSDP(FullyShardedDataParallel):
            # The adapter writes device_type="cuda", and asks for einops to lay out the ranks.
            def _init_dist_index(self, pg_collection: Any) -> Any:
                self.tp_group = parallel_state.get_tensor_model_parallel_group()
                return FSDPDistributedIndex(
                    device_mesh=mesh(
                        parallel_state.get_data_parallel_group(with_context_parallel=True),
                        self.tp_group,
                    ),
                    dp_shard_dim="dp_cp",
                    tp_dim="tp",
                    expt_device_mesh=mesh(
                        parallel_state.get_expert_data_parallel_group(),
                        parallel_state.get_expert_tensor_parallel_group(),
                    ),
                )

        # megatron_fsdp.py, MegatronFSDP.__init__: torch.device(f"cuda:{current_device()}").
        with replaced(torch.cuda, current_device=lambda: 0):
            return CpuFSDP(config, settings(strategy), model, device=torch.device("cpu"))

    return wrap


def outcome(config: Config, wrap: Callable[[Any, Any], Any], expected: Course) -> str:
    """What comes of it, in a line; every rank must call."""
    try:
        found = train(config, wrap)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        upstream = [frame for frame in frames if "/megatron/core/" in frame.filename]
        last = (upstream or frames)[-1]
        place = f"{last.filename.rpartition('site-packages/')[2]}:{last.lineno} `{last.line}`"
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({place})"
    pairs = list(zip(found, expected, strict=True))
    losses = max(abs(a - b) / b for (a, _), (b, _) in pairs)
    norms = max(abs(a - b) / b for (_, a), (_, b) in pairs)
    return f"trains; losses differ by {losses:.1e}, gradient norms by {norms:.1e} (relative)"


def main() -> None:
    """Try all, rank 0 prints."""
    from moepp_megatron.runtime.quiet import quiet

    quiet()
    with distributed.joined(RankEnvironment.read()):
        for experts in (1, dist.get_world_size()):
            overrides = [f"parallel.expert_model_parallel_size={experts}"]
            config = with_overrides(parse_config(CONFIG), overrides)
            expected = train(config, None)
            for name, how in (("as it is", as_it_is), ("on a CPU", on_cpu)):
                for strategy in STRATEGIES if how is on_cpu else STRATEGIES[-1:]:
                    forget_model()
                    line = outcome(config, how(strategy), expected)
                    if dist.get_rank() == 0:
                        print(f"EP{experts} {name}, {strategy}: {line}", flush=True)
            forget_model()


if __name__ == "__main__":
    main()
