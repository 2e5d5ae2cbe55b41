"""A checkpoint holds the newest parameters, even where their gathering waits for the next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.parallel.layouts import OPTIMIZER
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import SyntheticDataset, settings


def saved_weights(raw: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """What this rank hands to megatron-core to be saved after two steps, by checkpoint key."""
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.model.initialize import sharded_tensors
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training import checkpoint
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.setup import build_training_model
    from moepp_megatron.training.step import training_step

    config = parse_config(raw)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    model.set_training(True)
    batches = rank_batches(SyntheticDataset(config, 2), 0, config, len(model.chunks))
    for _ in range(2):
        training_step(model, batches, config, layout)
    handed: dict[str, np.ndarray] = {}

    class Saved(Exception):
        pass

    def save(state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for entry in nested_values(state["model0"]):
            for tensor in sharded_tensors(entry):
                handed[f"{tensor.key} {tensor.global_offset}"] = tensor.data.detach().numpy().copy()
        raise Saved

    original = checkpoint.dist_checkpointing.save
    checkpoint.dist_checkpointing.save = save
    try:
        checkpoint.save_checkpoint(
            folder, model, checkpoint.Progress(step=2), config, folder / "tokenizer.json"
        )
    except Saved:
        pass
    finally:
        checkpoint.dist_checkpointing.save = original
    return handed


def test_checkpoint_after_a_step_with_overlapped_gather(ranks: RankPools, tmp_path: Path) -> None:
    plain, overlapped = (
        ranks(2).run(saved_weights, settings(parallel=OPTIMIZER[name]), tmp_path)
        for name in ("distributed", "overlap both")
    )
    for expected, found in zip(plain, overlapped, strict=True):
        assert expected.keys() == found.keys() != set()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
