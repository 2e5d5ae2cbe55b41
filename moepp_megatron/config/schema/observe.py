"""Section `observe`: where records and alerts go besides the run's files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import Section, Unit


class WandbSection(Section):
    """Weights & Biases. Access is granted by `wandb login`, not here."""

    project: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """Project that records are sent to; null is off"""
    entity: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """User or team that the project belongs to; null takes the user's own"""
    mode: Annotated[Literal["online", "offline"], Unit("-")] = "online"
    """Send at once, or write RUN/wandb for `wandb sync` later"""


class EngineObserveSection(Section):
    """Sinks that leave the run's folder."""

    sinks: Annotated[list[Annotated[str, Plugin("sinks")]], Unit("-")] = []
    """Sinks of installed packages that get every record too"""
    wandb: WandbSection = WandbSection()
    """Weights & Biases"""
    webhook_url_env: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """Environment variable that holds the address alerts are posted to (https, or localhost), so
    that the address is in no file; null is off"""
