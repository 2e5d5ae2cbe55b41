"""Samples the machine in the background while a run trains, and aligns samples with steps.

sampler.py  one background thread per node that samples its devices
sources.py  sources of samples: a node's GPUs through NVML, or its CPU through psutil
usage.py    samples of devices, and their sums over time and over nodes
"""

from moepp_megatron.observe.telemetry.sampler import Sampler
from moepp_megatron.observe.telemetry.sources import CpuSource, GpuSource, TelemetrySource
from moepp_megatron.observe.telemetry.usage import NOTHING, DeviceSample, Usage

__all__ = [
    "NOTHING",
    "CpuSource",
    "DeviceSample",
    "GpuSource",
    "Sampler",
    "TelemetrySource",
    "Usage",
]
