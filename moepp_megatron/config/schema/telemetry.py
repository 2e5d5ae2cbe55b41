"""Section `telemetry`: samples of the machine while a run trains."""

from __future__ import annotations

from pydantic import Field

from moepp_megatron.config.schema.section import PathText, Section, unit


class TelemetrySection(Section):
    """Power, utilisation, memory and links of the GPUs, or of the CPU where there are none."""

    interval_s: float = Field(
        default=1.0,
        ge=0.0,
        description="Time between samples, taken by one background thread a node; energy is read "
        "from the cards' counters and needs no more of them. 0 is off, MFU included",
        json_schema_extra=unit("s"),
    )
    hardware: PathText | None = Field(
        default=None,
        min_length=1,
        description="Card whose rated speed MFU is measured by: a name in configs/hardware or a "
        "YAML file; null takes the card that is here",
        json_schema_extra=unit("-"),
    )
