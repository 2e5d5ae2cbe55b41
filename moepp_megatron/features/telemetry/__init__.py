"""Samples the machine in the background while a run trains (`telemetry`).

settings.py the section `telemetry`
part.py     telemetry of all nodes, aligned with steps
sampler.py  one background thread per node that samples its devices
sources.py  sources of samples: a node's GPUs through NVML, or its CPU through psutil
usage.py    samples of devices, and their sums over time and over nodes
"""
