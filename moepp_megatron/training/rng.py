"""Random states of a rank: torch, CUDA, numpy, Python, Megatron's tracker of named streams."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)

KEY = "rng_state"


def sharded_rng_state(with_data: bool) -> ShardedObject:
    """This rank's entry of the checkpoint; every rank has its own."""
    return ShardedObject(
        key=KEY,
        data=get_rng_state() if with_data else None,
        global_shape=(dist.get_world_size(),),
        global_offset=(dist.get_rank(),),
        replica_id=0,
    )


def get_rng_state() -> dict[str, Any]:
    """All random states of this process, as plain data that loads with `weights_only`."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        # numpy's arrays are not among the plain types.
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), next_gauss],
        "tracker": {
            name: state.get_state() if isinstance(state, torch.Generator) else state
            for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the random states of `get_rng_state`."""
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    tracker = get_cuda_rng_tracker()
    present = tracker.get_states()
    for name, stream in state["tracker"].items():
        # With CUDA graphs the streams are generators, which graphs know by their identity.
        if isinstance(present.get(name), torch.Generator):
            present[name].set_state(stream)
        else:
            present[name] = stream
    tracker.set_states(present)


def reseed(seed: int, step: int) -> None:
    """Seed all streams again for a run that continues at `step` in another layout."""
    # The run's own seed would repeat the noise of its first steps.
    seed = (seed + 1_000_003 * step) % 2**31
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
