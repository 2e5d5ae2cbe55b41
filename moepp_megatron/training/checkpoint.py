"""Checkpoints of a run: where they are, how they are written and read.

A checkpoint is a folder `step_NNNNNNNN` in megatron-core's distributed format, which loads into any
layout, with the resolved configuration and the tokenizer beside it so that it stands alone. It is
written under a temporary name and renamed when complete; `latest` is updated last.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from moepp_megatron.config import Config, ConfigError
from moepp_megatron.training.setup import TrainingModel

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
_LATEST = "latest"
_PREFIX = "step_"
# Optimizer state is stored per parameter, not per data-parallel bucket, so that it loads into any
# layout.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps taken.
        consumed_samples: Training sequences read by all ranks.
        tokens: Tokens trained on.
        skipped_steps: Batches that the numerical guard refused.
        recent_losses: The losses that the guard compares the next one with.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    recent_losses: list[float] = field(default_factory=list)


def save_checkpoint(
    folder: Path, model: TrainingModel, progress: Progress, config: Config, tokenizer: Path
) -> Path:
    """Write a checkpoint; every rank must call.

    Args:
        folder: The run's checkpoint folder.
        model: Model, optimizer and schedule.
        progress: Where the run stands.
        config: Resolved configuration, written beside the weights.
        tokenizer: The tokenizer's file, copied beside the weights.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"{_PREFIX}{progress.step:08d}"
    temporary = folder / f".{final.name}.incomplete"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    if config.parallel.overlap_param_gather:
        # The gather that follows an optimizer step is put off to the next forward pass: until then
        # a rank has the new values of its own shard alone.
        for chunk in model.chunks:
            chunk.start_param_sync(force_sync=True)
    state = _state_dict(model, is_loading=False)
    state["progress"] = asdict(progress)
    dist_checkpointing.save(
        state, str(temporary), verify_integrity=True, content_metadata=_METADATA
    )
    if dist.get_rank() == 0:
        (temporary / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
        shutil.copyfile(tokenizer, temporary / TOKENIZER_FILE)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _point_latest_to(folder, final.name)
    dist.barrier()
    return final


def load_checkpoint(checkpoint: Path, model: TrainingModel) -> Progress:
    """Read model, optimizer and schedule in place; every rank must call.

    From a checkpoint of weights alone (`moepp convert`) the weights are read, and training starts
    at step 0 with a fresh optimizer.
    """
    if not holds_training_state(checkpoint):
        load_weights(checkpoint, model.models)
        # The optimizer's fp32 copies were taken from the weights that these replace.
        model.optimizer.reload_model_params()
        return Progress()
    state = _state_dict(model, is_loading=True)
    loaded = dist_checkpointing.load(state, str(checkpoint), verify_integrity=True)
    _load_models(model.models, loaded)
    model.optimizer.load_state_dict(loaded["optimizer"])
    # Loading adds the stored steps to those taken; a rollback comes from further on.
    model.scheduler.num_steps = 0
    model.scheduler.load_state_dict(loaded["scheduler"])
    return Progress(**loaded["progress"])


def holds_training_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds optimizer, schedule and progress beside the weights."""
    return "scheduler" in dist_checkpointing.load_common_state_dict(str(checkpoint))


def load_weights(checkpoint: Path, models: list[GPTModel]) -> None:
    """Read the model's weights alone, in place, whatever layout wrote them."""
    state: dict[str, Any] = _model_state(models)
    loaded = dist_checkpointing.load(state, str(checkpoint), verify_integrity=True)
    _load_models(models, loaded)


def find_checkpoint(name: str | Path) -> Path:
    """The checkpoint that `name` means: a checkpoint folder, or a run (its latest one).

    Raises:
        ConfigError: If there is none.
    """
    path = Path(name)
    if is_checkpoint(path):
        return path
    for folder in (path, path / "checkpoints"):
        latest = latest_checkpoint(folder)
        if latest is not None:
            return latest
    raise ConfigError(
        f"checkpoint ({path}) must be a checkpoint folder or a run that has one; "
        "train with checkpoint.save_interval > 0 or name another folder"
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` points to in a run's checkpoint folder, if it is there."""
    try:
        name = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    checkpoint = folder / name
    return checkpoint if is_checkpoint(checkpoint) else None


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a complete checkpoint folder of ours."""
    return (path / "metadata.json").is_file() and (path / CONFIG_FILE).is_file()


def _model_state(models: list[GPTModel]) -> dict[str, Any]:
    return {
        f"model{index}": model.sharded_state_dict(metadata=dict(_METADATA))
        for index, model in enumerate(models)
    }


def _state_dict(model: TrainingModel, is_loading: bool) -> dict[str, Any]:
    state = _model_state(model.models)
    tensors = {
        f"{chunk}.{key}": tensor
        for chunk, chunk_state in state.items()
        for key, tensor in chunk_state.items()
    }
    state["optimizer"] = model.optimizer.sharded_state_dict(
        tensors, is_loading=is_loading, metadata=dict(_METADATA)
    )
    state["scheduler"] = model.scheduler.state_dict()
    return state


def _load_models(models: list[GPTModel], loaded: dict[str, Any]) -> None:
    for index, model in enumerate(models):
        model.load_state_dict(loaded[f"model{index}"])


def _point_latest_to(folder: Path, name: str) -> None:
    temporary = folder / f".{_LATEST}.incomplete"
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, folder / _LATEST)
