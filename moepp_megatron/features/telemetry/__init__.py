"""Samples the machine in the background while a run trains (`telemetry`).

settings.py the section `telemetry`
part.py     telemetry of all nodes, aligned with steps
sampler.py  one background thread per node that samples its devices, and what samples sum up to
"""
