"""Writes a layout as settings of a configuration, and as a YAML file based on another one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from moepp_megatron.config import Config, Layout, with_overrides
from moepp_megatron.workbench.planning.grid import FULL, Grid
from moepp_megatron.workbench.planning.pipeline import layout_string, stage_sizes


def settings_of(grid: Grid, layers: int) -> dict[str, dict[str, Any]]:
    """Every setting that a layout decides, by section.

    Args:
        grid: The layout.
        layers: Transformer layers of the model.
    """
    stages = grid.pp * grid.vpp
    text = layout_string(stage_sizes(layers, stages)) if layers % stages else None
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
    training: dict[str, Any] = {
        "micro_batch_size": grid.micro_batch,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
    }
    if grid.recompute == FULL:
        training |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform" if grid.recomputed_layers is None else "block",
            "recompute_num_layers": grid.recomputed_layers or 1,
        }
    elif grid.recompute:
        training |= {
            "recompute_granularity": "selective",
            "recompute_modules": list(grid.recompute),
        }
    settings = {"parallel": parallel, "training": training}
    if grid.dispatcher is not None:
        settings["moe"] = {"dispatcher": grid.dispatcher}
    return settings


def config_of(config: Config, grid: Grid) -> Config:
    """The configuration in this layout, checked by every rule, those of the world size too.

    Raises:
        ConfigError: If a rule refuses the layout.
    """
    overrides = [
        f"{section}.{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"
        for section, keys in settings_of(grid, config.model.num_layers).items()
        for key, value in keys.items()
    ]
    changed = with_overrides(config, overrides)
    Layout.from_config(changed, grid.world)
    return changed


def overlay_text(
    grid: Grid, layers: int, base: Path, target: Path, changes: dict[str, Any], comment: str
) -> str:
    """YAML that turns the file `base` into this layout.

    Args:
        grid: The layout.
        layers: Transformer layers of the model.
        base: The configuration that was planned for.
        target: Where the text will be written: `base:` is relative to it.
        changes: Overrides that were given with the configuration, by section.
        comment: Lines for the top of the file.
    """
    content: dict[str, Any] = {"base": os.path.relpath(base.resolve(), target.resolve().parent)}
    for section, keys in settings_of(grid, layers).items():
        content[section] = keys
    for section, keys in changes.items():
        # What the plan decides wins: it was given for the plan's starting point.
        content[section] = {**keys, **content.get(section, {})}
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    return header + yaml.safe_dump(content, sort_keys=False)
