"""The sinks that receive a run's records."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from moepp_megatron.config import Config
from moepp_megatron.observe.sinks import Sinks, SinkSettings, WandbRun, open_sinks
from moepp_megatron.training.checkpoint.progress import Progress


def open_run_sinks(config: Config, progress: Progress) -> Sinks | None:
    """The run's sinks; on one rank, since records are global, and None on the others."""
    if dist.get_rank() != 0:
        return None
    moe = config.moe
    return open_sinks(
        SinkSettings(
            Path(config.run.dir),
            moe,
            phi=moe.ffn_share,
            total_steps=config.training.train_iters,
            resume_step=progress.step + 1,
            wandb=_wandb(config),
            moe_layers=[
                number for number, is_moe in enumerate(config.router_pattern, start=1) if is_moe
            ],
            plugins=config.observe.sinks,
        )
    )


def _wandb(config: Config) -> WandbRun | None:
    settings = config.observe.wandb
    if settings.project is None:
        return None
    return WandbRun(settings, config.run.name, config.model_dump(mode="json"))
