"""Loads a checkpoint: finds it, verifies it, and reads it into the present layout."""

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

from moepp_megatron.config import Config, ConfigError, Layout, load_config
from moepp_megatron.config.errors import show
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.layer_settings import EXPORTED
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.runtime.distributed import Agreement
from moepp_megatron.training import rng
from moepp_megatron.training.checkpoint.compatible import check_compatible, differences
from moepp_megatron.training.checkpoint.data_only import load_data, unsafe_pickle
from moepp_megatron.training.checkpoint.files import (
    Progress,
    SavedRecord,
    checkpoint_step,
    damage,
    grid,
)
from moepp_megatron.training.checkpoint.find import (
    chosen_start,
    first_valid,
    list_checkpoints,
    warn_skipped,
)
from moepp_megatron.training.checkpoint.state import (
    apply_model_state,
    apply_state,
    model_state,
    state_to_load,
)
from moepp_megatron.training.schedule import learning_rate
from moepp_megatron.training.setup import TrainingModel

logger = logging.getLogger(__name__)


def find_start(config: Config, folder: Path) -> Path | None:
    """The checkpoint that `checkpoint.load` means, verified; every rank must call.

    None where training starts from scratch; `auto` looks into `folder`, the run's own. NoStartError
    if there are only damaged ones, or none of the name that was given.
    """
    start = chosen_start(config, folder, _first_agreed)
    if start is None and config.checkpoint.load is not None and dist.get_rank() == 0:
        logger.warning("no checkpoint in %s: training starts from scratch", folder)
    return start


def newest_valid(folder: Path, up_to_step: int | None) -> Path | None:
    """The newest valid checkpoint of at most `up_to_step` steps; every rank must call."""
    candidates = list_checkpoints(folder)
    if up_to_step is not None:
        candidates = [path for path in candidates if checkpoint_step(path) <= up_to_step]
    return _first_agreed(candidates)[0]


def _first_agreed(candidates: list[Path]) -> tuple[Path | None, list[str]]:
    """The first valid checkpoint, and why those before it are not valid."""
    agreement = Agreement()
    # Rank 0 looks, so that ranks which see a folder's changes late do not choose another one.
    candidates = agreement.from_first(candidates)
    start, skipped = first_valid(candidates, lambda path: agreed_reason(path, agreement))
    if dist.get_rank() == 0:
        warn_skipped(skipped)
    return start, skipped


def read_checkpoint(
    checkpoint: Path, model: TrainingModel, config: Config, weights_only: bool = False
) -> tuple[Progress, dict[str, Any]]:
    """Load a checkpoint that `find_start` verified, in place; every rank must call.

    `weights_only` begins at step 0 with a fresh optimizer. ConfigError if the shapes differ.
    """
    saved = check_compatible(checkpoint, config)
    has_biases = saved.moe.selection_bias or not config.moe.selection_bias
    record = SavedRecord.read(checkpoint)
    with model.gathered_parameters():
        if weights_only or record is None:
            _read_weights(checkpoint, model.models, has_biases)
            # The optimizer's fp32 copies were taken from the weights that these replace.
            model.optimizer.reload_model_params()
            return Progress(), {}
        layout = grid(Layout.from_config(config, dist.get_world_size()))
        is_same_layout = layout == record.layout
        state = state_to_load(model)
        if is_same_layout:
            state[rng.KEY] = rng.sharded_rng_state(with_data=False)
        if not has_biases:
            _keep_biases(state)
        loaded = load_data(state, checkpoint)
        apply_state(model, loaded)
    _restore_rng(loaded.get(rng.KEY), config, record.progress, record.layout)
    return record.progress, loaded["extra"]


def load_weights(checkpoint: Path, models: list[MoEPPGPTModel]) -> None:
    """Load only weights, in place; ConfigError if damaged or unsafe. Every rank must call."""
    reason = agreed_reason(checkpoint, Agreement())
    if reason is not None:
        raise ConfigError(
            f"checkpoint ({checkpoint}) must be whole and hold nothing but data, and: {reason}; "
            "use another one"
        )
    _read_weights(checkpoint, models)


def _read_weights(checkpoint: Path, models: list[MoEPPGPTModel], has_biases: bool = True) -> None:
    state: dict[str, Any] = model_state(models)
    if not has_biases:
        _keep_biases(state)
    apply_model_state(models, load_data(state, checkpoint))


def _keep_biases(state: dict[str, Any]) -> None:
    """Keep the model's selection biases, 0 at first, for a checkpoint that was trained without."""
    for chunk in (value for key, value in state.items() if key.startswith("model")):
        for key in [key for key in chunk if key.endswith("router.expert_bias")]:
            chunk[key] = LocalNonpersistentObject(chunk[key].data)


def _restore_rng(
    state: dict[str, Any] | None, config: Config, progress: Progress, layout: dict[str, int]
) -> None:
    if state is not None:
        rng.set_rng_state(state)
        return
    rng.reseed(config.training.seed, progress.step)
    if dist.get_rank() == 0:
        logger.warning(
            "random states are seeded again: the checkpoint was written by another layout (%s)",
            _grid_text(layout),
        )


def agreed_reason(checkpoint: Path, agreement: Agreement) -> str | None:
    """Explain why a checkpoint must not be read, or None; ranks share the work and the answer."""
    part, num_parts = dist.get_rank(), dist.get_world_size()
    mine = damage(checkpoint, part, num_parts) or unsafe_pickle(checkpoint, part, num_parts)
    return next((reason for reason in agreement.gather(mine) if reason is not None), None)


# A change of the learning rate by rounding is not reported.
_SAME_LR = 1e-6
# What a token gets from routers and experts depends on these; shapes are refused elsewhere.
_ROUTES = {f"moe.{name}" for name in (*EXPORTED, "router_topk", "capacity_factor")}


def start_lines(
    checkpoint: Path, record: SavedRecord | None, config: Config, layout: Layout
) -> list[str]:
    """Name the checkpoint and its differences, a line each; `record` is None for weights only."""
    if record is None:
        return [f"started from the weights of {checkpoint}"]
    step = record.progress.step
    lines = [f"resumed from step {step} of {checkpoint}"]
    if changed := record.changed_versions():
        lines.append(
            f"warning: it was written with {', '.join(changed)}: the run may differ in bits from "
            "one without a break"
        )
    if record.layout != grid(layout):
        lines.append(f"  layout: {_grid_text(grid(layout))}; before: {_grid_text(record.layout)}")
    before = load_config(checkpoint / CONFIG_FILE)
    changes = differences(before, config)
    lines += [f"  {name}: {show(now)}; before: {show(was)}" for name, was, now in changes]
    if routed := [name for name, _, _ in changes if name in _ROUTES]:
        lines.append(
            f"warning: {', '.join(routed)}: tokens are routed in another way than the checkpoint "
            "was trained to, until training has adapted the routers"
        )
    old, new = (learning_rate(each, step + 1) for each in (before, config))
    if abs(new - old) > _SAME_LR * max(new, old):
        lines.append(f"  learning rate of step {step + 1}: {new:.3g}; before: {old:.3g}")
    return lines


def _grid_text(layout: dict[str, int]) -> str:
    return " ".join(f"{name}={degree}" for name, degree in layout.items())
