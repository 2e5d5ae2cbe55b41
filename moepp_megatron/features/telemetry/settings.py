"""Section `telemetry`: the machine while a run trains."""

from typing import Annotated

from moepp_megatron.config.schema.section import PathText, Section, Unit


class TelemetrySection(Section):
    """Power, utilisation, memory and links of the GPUs, or of the CPU where there are none."""

    interval_s: Annotated[float, Unit("s", ge=0.0)] = 1.0
    """Time between samples, taken by one background thread a node; energy is read from the GPUs'
    counters and needs no more of them. 0 is off, MFU included"""
    hardware: PathText | None = None
    """GPU whose rated speed MFU is measured by: a name in configs/hardware or a YAML file; null
    takes the GPU that is here"""

    uses = "hardware=gpu"
