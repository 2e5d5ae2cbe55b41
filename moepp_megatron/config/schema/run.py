"""Section `run`: the folder of a run, its name and further parts."""

from typing import Annotated

from moepp_megatron.config.plugins import Plugin
from moepp_megatron.config.schema.section import ConfigPath, FilledText, Section


class EngineRunSection(Section):
    """Settings of a run's folder and name."""

    dir: ConfigPath
    """Folder of the run: config.yaml, metrics.jsonl, checkpoints, report"""
    name: FilledText = "moepp"
    """Name shown in reports and logs"""
    parts: list[Annotated[str, Plugin("parts")]] = []
    """Parts of installed packages, called after the package's own"""
    numa_binding: bool = True
    """Keep each rank on the CPU cores of its GPU's NUMA node that it may use"""
