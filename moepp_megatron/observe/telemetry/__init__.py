"""Samples the machine while a run trains: in the background, aligned with steps."""

from moepp_megatron.observe.telemetry.sampler import Sampler
from moepp_megatron.observe.telemetry.sources import CpuSource, GpuSource, Source
from moepp_megatron.observe.telemetry.usage import NOTHING, DeviceSample, Usage

__all__ = ["NOTHING", "CpuSource", "DeviceSample", "GpuSource", "Sampler", "Source", "Usage"]
