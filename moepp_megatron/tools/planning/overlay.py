"""Writes a layout as settings of a configuration, and as a YAML file based on another one."""

import os
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config import Config, Layout, with_overrides
from moepp_megatron.tools.planning.grid import Grid, States
from moepp_megatron.tools.planning.pipeline import layout_string

_LOWERED: dict[str, tuple[str, dict[str, Any]]] = {
    "moments": ("optimizer", {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}),
    "gradients": ("precision", {"grad_reduce_in_fp32": False}),
}


def settings_of(grid: Grid, layers: int) -> dict[str, dict[str, Any]]:
    """Every setting that a layout decides, by section."""
    stages = grid.pp * grid.vpp
    text = layout_string(layers, stages) if layers % stages else None
    parallel = {
        "tensor_model_parallel_size": grid.tp,
        "context_parallel_size": grid.cp,
        "pipeline_model_parallel_size": grid.pp,
        "virtual_pipeline_model_parallel_size": grid.vpp if grid.vpp > 1 else None,
        "pipeline_model_parallel_layout": text,
        "expert_model_parallel_size": grid.ep,
        "expert_tensor_parallel_size": grid.etp,
        "sequence_parallel": grid.tp > 1,
        "use_distributed_optimizer": grid.distributed_optimizer,
        "overlap_grad_reduce": grid.grad_overlap,
        "overlap_param_gather": grid.param_overlap,
        "overlap_moe_expert_parallel_comm": grid.expert_overlap,
    }
    is_whole, some = grid.recomputes_all, grid.recomputed_layers
    granularity = "full" if is_whole else "selective" if grid.recompute else None
    training: dict[str, Any] = {
        "micro_batch_size": grid.micro_batch,
        "recompute_granularity": granularity,
        "recompute_method": ("uniform" if some is None else "block") if is_whole else None,
        "recompute_num_layers": (some or 1) if is_whole else None,
    }
    if grid.recompute and not is_whole:
        training["recompute_modules"] = list(grid.recompute)
    settings = {"parallel": parallel, "training": training}
    settings |= dict(_LOWERED[state] for state in grid.states)
    if grid.dispatcher is not None:
        settings["moe"] = {"dispatcher": grid.dispatcher}
    return settings


def config_of(config: Config, grid: Grid) -> Config:
    """The configuration in this layout, checked by every rule; ConfigError if one refuses it."""
    changed = _with_settings(config, settings_of(grid, config.model.num_layers))
    Layout.from_config(changed, grid.world)
    return changed


def with_states(config: Config, states: States) -> Config:
    """The configuration with these states in bf16; ConfigError if a rule refuses it."""
    return _with_settings(config, dict(_LOWERED[state] for state in states))


def _with_settings(config: Config, settings: dict[str, dict[str, Any]]) -> Config:
    overrides = [
        f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for section, keys in settings.items()
        for key, value in keys.items()
    ]
    return with_overrides(config, overrides)


def overlay_text(
    grid: Grid, layers: int, base: Path, target: Path, changes: dict[str, Any], comment: str
) -> str:
    """YAML for the file `target` that turns the file `base` into this layout, under a comment.

    `changes` are the overrides that were given with the configuration, by section.
    """
    content: dict[str, Any] = {"base": os.path.relpath(base.resolve(), target.resolve().parent)}
    content |= settings_of(grid, layers)
    for section, keys in changes.items():
        # What the plan decides wins: it was given for the plan's starting point.
        content[section] = {**keys, **content.get(section, {})}
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    return header + yaml.safe_dump(content, sort_keys=False)
