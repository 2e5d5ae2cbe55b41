"""Section `observe`: router health, and where records and alerts go besides the run's files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import PathText, Section, unit


class WandbSection(Section):
    """Weights & Biases. Access is granted by `wandb login`, not here."""

    project: str | None = Field(
        default=None,
        min_length=1,
        description="Project that records are sent to; null is off",
        json_schema_extra=unit("-"),
    )
    entity: str | None = Field(
        default=None,
        min_length=1,
        description="User or team that the project belongs to; null takes the user's own",
        json_schema_extra=unit("-"),
    )
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="Send at once, or write RUN/wandb for `wandb sync` later",
        json_schema_extra=unit("-"),
    )


class ObserveSection(Section):
    """How closely routers are measured, and sinks that leave the run's folder."""

    health_interval: int = Field(
        default=10,
        ge=0,
        description="Steps from one measurement of router health to the next; it costs a few "
        "percent of a measured step; 0 is off",
        json_schema_extra=unit("steps"),
    )
    token_groups: bool = Field(
        default=True,
        description="Measure FFN experts by class of tokens, and loss, FFN share and use of the "
        "experts by data source where the prepared data have several",
        json_schema_extra=unit("-"),
    )
    sinks: list[Annotated[str, Plugin("sinks")]] = Field(
        default=[],
        description="Sinks of installed packages that get every record too",
        json_schema_extra=unit("-"),
    )
    wandb: WandbSection = Field(default_factory=WandbSection, description="Weights & Biases")
    webhook_url_env: str | None = Field(
        default=None,
        min_length=1,
        description="Environment variable that holds the address alerts are posted to (https, or "
        "localhost), so that the address is in no file; null is off",
        json_schema_extra=unit("-"),
    )


class TelemetrySection(Section):
    """Power, utilisation, memory and links of the GPUs, or of the CPU where there are none."""

    interval_s: float = Field(
        default=1.0,
        ge=0.0,
        description="Time between samples, taken by one background thread a node; energy is read "
        "from the GPUs' counters and needs no more of them. 0 is off, MFU included",
        json_schema_extra=unit("s"),
    )
    hardware: PathText | None = Field(
        default=None,
        min_length=1,
        description="GPU whose rated speed MFU is measured by: a name in configs/hardware or a "
        "YAML file; null takes the GPU that is here",
        json_schema_extra=unit("-"),
    )
