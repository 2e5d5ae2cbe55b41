"""Section `observe`: where records and alerts go besides the run's files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.rows import no_effect_where, refuse, table
from moepp_megatron.config.schema.section import FilledText, Section

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config


class WandbSection(Section):
    """Weights & Biases. Access is granted by `wandb login`, not here."""

    project: FilledText | None = None
    """Project that records are sent to; null is off"""
    entity: FilledText | None = None
    """User or team that the project belongs to; null takes the user's own"""
    mode: Literal["online", "offline"] = "online"
    """Send at once, or write RUN/wandb for `wandb sync` later"""

    megatron_flags = "wandb-project=project"


def _is_no_name(config: Config) -> bool:
    name = config.observe.webhook_url_env
    return name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)


class EngineObserveSection(Section):
    """Sinks that leave the run's folder."""

    sinks: list[Annotated[str, Plugin("sinks")]] = []
    """Sinks of installed packages that get every record too"""
    wandb: WandbSection = WandbSection()
    """Weights & Biases"""
    webhook_url_env: FilledText | None = None
    """Environment variable that holds the address alerts are posted to (https, or localhost), so
    that the address is in no file; null is off"""

    engine_defaults = {"health_interval": 0}
    own_rules = table(
        # The address is a secret: it is read from the environment and never part of a message.
        refuse(
            "observe.webhook_url_env",
            _is_no_name,
            "must be the name of an environment variable, not an address (not shown here)",
            "export MOEPP_WEBHOOK=ADDRESS and use MOEPP_WEBHOOK",
            value=lambda c: "...",
        ),
    )
    no_effect = table(
        no_effect_where(
            "not observe.wandb.project",
            "without observe.wandb.project",
            "observe.wandb.entity observe.wandb.mode",
            "name a project",
        ),
    )
