"""Starts the job of each point and records its outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moepp_megatron.config import ConfigError
from moepp_megatron.runtime.launch import LaunchOptions, run_ranks
from moepp_megatron.runtime.nodes import Nodes
from moepp_megatron.workbench.experiments.scaling.folder import (
    ScalingFolder,
    failure_reason,
    unfinished,
)
from moepp_megatron.workbench.experiments.scaling.grid import Point

# Statuses above it mean that somebody has asked this process to stop.
_SIGNALLED = 128


class Interrupted(Exception):
    """The process was asked to stop.

    Attributes:
        point: The point that was being measured; it stays unfinished.
        status: Exit status.
    """

    def __init__(self, point: Point, status: int) -> None:
        super().__init__(f"interrupted at {point.name}; run again to go on")
        self.point, self.status = point, status


@dataclass(frozen=True)
class Jobs:
    """The jobs of a scaling test.

    Attributes:
        folder: Folder of the points.
        command: `moepp` arguments that measure a point as one rank, but for `--point NAME`.
    """

    folder: ScalingFolder
    command: Sequence[str]

    def run(self, point: Point, nodes: Nodes | None = None) -> str | None:
        """Measure one point; the ranks of this machine are started here.

        Args:
            point: What to measure.
            nodes: The machines, each of which makes this call; None for this one alone.

        Returns:
            Why it failed, or None.

        Raises:
            Interrupted: If stopped from outside.
            ConfigError: If the ranks cannot be divided among the machines.
        """
        count = nodes.count if nodes is not None else 1
        if point.nproc % count:
            raise ConfigError(
                f"--nnodes ({count}) must divide the ranks of --point ({point.nproc}); use 1"
            )
        node = (nodes.rank or 0) if nodes is not None else 0
        log = self.folder.log(point, node)
        options = LaunchOptions(point.nproc // count, nodes, output=log)
        arguments = [*self.command, "--point", point.name]
        status = run_ranks(options, "moepp_megatron.cli.main", arguments)
        if status > _SIGNALLED:
            raise Interrupted(point, status)
        if status == 0:
            return None
        reason = failure_reason(log, status)
        if node == 0:
            self.folder.fail(point, reason)
        return reason

    def run_missing(
        self, points: Sequence[Point], progress: Callable[[str], object] = lambda what: None
    ) -> dict[str, str]:
        """Measure unfinished points on this machine; a failed point does not stop the others.

        Args:
            points: All points of the test.
            progress: Called with a point's name before it is measured.

        Returns:
            Why points failed, by name.

        Raises:
            Interrupted: If stopped from outside.
        """
        failures = {}
        for point in unfinished(self.folder, points):
            progress(point.name)
            reason = self.run(point)
            if reason is not None:
                failures[point.name] = reason
        return failures
