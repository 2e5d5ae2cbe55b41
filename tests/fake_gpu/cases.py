"""The cases that are played: shipped configurations at full width, and layouts and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moepp_megatron.config import load_config

ROOT = Path(__file__).parents[2]
MODELS = sorted((ROOT / "configs/models").glob("[a-z]*.yaml"))
PLANNED = sorted((ROOT / "configs/h100").glob("*.yaml"))


def shipped(path: Path) -> dict[str, Any]:
    """A shipped configuration on as many ranks as it is meant for, two layers a pipeline chunk."""
    config = load_config(path, ["data.path=none", "run.dir=none"])
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = stages * (parallel.virtual_pipeline_model_parallel_size or 1)
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    needed = stages * max(
        ranks, parallel.tensor_model_parallel_size * parallel.context_parallel_size
    )
    world = int(path.stem.rpartition("_")[2]) if path in PLANNED else needed
    overrides = [
        f"model.num_layers={2 * chunks}",
        f"training.global_batch_size={2 * world}",
        "parallel.pipeline_model_parallel_layout=null",
    ]
    if not isinstance(config.moe.layer_freq, int):
        # As many dense layers at the start as fit.
        overrides.append(f"moe.layer_freq={[0] + [1] * (2 * chunks - 1)}")
    return {"config": str(path.relative_to(ROOT)), "overrides": overrides, "world_size": world}
