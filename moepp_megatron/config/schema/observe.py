"""Section `observe`: router health, and where records and alerts go besides the run's files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import PathText, Section, Unit


class WandbSection(Section):
    """Weights & Biases. Access is granted by `wandb login`, not here."""

    project: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """Project that records are sent to; null is off"""
    entity: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """User or team that the project belongs to; null takes the user's own"""
    mode: Annotated[Literal["online", "offline"], Unit("-")] = "online"
    """Send at once, or write RUN/wandb for `wandb sync` later"""


class ObserveSection(Section):
    """How closely routers are measured, and sinks that leave the run's folder."""

    health_interval: Annotated[int, Unit("steps"), Field(ge=0)] = 10
    """Steps from one measurement of router health to the next; it costs a few percent of a measured
    step; 0 is off"""
    token_groups: Annotated[bool, Unit("-")] = True
    """Measure FFN experts by class of tokens, and loss, FFN share and use of the experts by data
    source where the prepared data have several"""
    sinks: Annotated[list[Annotated[str, Plugin("sinks")]], Unit("-")] = []
    """Sinks of installed packages that get every record too"""
    wandb: WandbSection = WandbSection()
    """Weights & Biases"""
    webhook_url_env: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """Environment variable that holds the address alerts are posted to (https, or localhost), so
    that the address is in no file; null is off"""


class TelemetrySection(Section):
    """Power, utilisation, memory and links of the GPUs, or of the CPU where there are none."""

    interval_s: Annotated[float, Unit("s"), Field(ge=0.0)] = 1.0
    """Time between samples, taken by one background thread a node; energy is read from the GPUs'
    counters and needs no more of them. 0 is off, MFU included"""
    hardware: Annotated[PathText | None, Unit("-"), Field(min_length=1)] = None
    """GPU whose rated speed MFU is measured by: a name in configs/hardware or a YAML file; null
    takes the GPU that is here"""
