"""Settings of router health in the section `observe`."""

from typing import Annotated

from moepp_megatron.config.schema.section import Section, Unit


class RouterHealthSettings(Section):
    """Interval of router health."""

    health_interval: Annotated[int, Unit("steps", ge=0)] = 10
    """Steps from one measurement of router health to the next; it costs a few percent of a measured
    step; 0 is off"""
