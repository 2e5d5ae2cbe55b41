"""Process groups: from a rank's environment to Megatron's rank grid."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moepp_megatron.config import Config, Layout
from moepp_megatron.runtime import cpu_support


@dataclass(frozen=True)
class RankEnvironment:
    """What torchrun or srun told this process about itself."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def read(cls) -> RankEnvironment:
        """From the variables that torchrun sets; alone where there are none."""
        env = os.environ
        world_size = int(env.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", str(world_size))),
        )


def start(environment: RankEnvironment, timeout: timedelta = timedelta(minutes=10)) -> torch.device:
    """Choose the device, set threads, join the default process group (NCCL, or gloo on CPUs).

    Args:
        environment: This rank's place.
        timeout: After which a collective that a rank never joins raises.

    Returns:
        The device of this rank.
    """
    _quiet()
    on_cpu = cpu_support.install()
    if on_cpu:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ or environment.world_size == 1:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // environment.local_world_size))
    else:
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        # A lone process needs no address to meet others at.
        store = dist.HashStore() if environment.world_size == 1 else None
        dist.init_process_group(
            backend,
            store=store,
            rank=environment.rank,
            world_size=environment.world_size,
            timeout=timeout,
        )
    return device


def build_groups(config: Config, layout: Layout) -> None:
    """Create Megatron's process groups and seed its random streams.

    Args:
        config: The run's configuration; the seed is `training.seed`.
        layout: The rank grid; must match the default process group's size.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world_size = dist.get_world_size()
    assert layout.world_size == world_size, f"layout of {layout.world_size}, {world_size} ranks"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(config.training.seed)
    model_parallel_cuda_manual_seed(config.training.seed)


def stop() -> None:
    """Destroy every process group of this process."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _quiet() -> None:
    """Silence messages that say nothing about the user's run."""
    import logging

    # Printed on import by megatron-core and torch for every optional package that is missing and on
    # every machine without a GPU; `moepp doctor` reports the same on request.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=".*Apex is not installed.*")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # GPTModel announces its successor on every construction (see docs/LOG.md).
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
