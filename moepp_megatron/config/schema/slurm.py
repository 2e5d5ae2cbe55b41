"""Section `slurm`: what `moepp slurm` asks the scheduler for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

from moepp_megatron.config.rows import each, entries, refuse, values
from moepp_megatron.config.schema.section import FilledText, Section, Unit

if TYPE_CHECKING:
    from moepp_megatron.config.schema import Config

# What Slurm's names and lists of names consist of, and how it writes durations.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:&|()\[\]*%+-]*")
_TIME = re.compile(r"(\d+-\d{1,2}(:\d{2}){0,2})|(\d+(:\d{2}){0,2})")


def _seconds(time: str) -> int:
    """A duration in one of Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _limit(config: Config) -> int:
    """The time limit in seconds; 0 for none, as Slurm takes it, and for what is no duration."""
    time = config.slurm.time
    return _seconds(time) if time is not None and _TIME.fullmatch(time) else 0


class SlurmSection(Section):
    """A job of this run on a Slurm cluster; has no effect on training itself."""

    nodes: Annotated[int, Unit("nodes", ge=1)] = 1
    """Nodes of the job"""
    min_nodes: Annotated[int | None, Unit("nodes", ge=1)] = None
    """Fewest nodes that the job continues with when some are lost; null waits for all"""
    gpus_per_node: Annotated[int, Unit("GPUs", ge=0)] = 8
    """GPUs, and so ranks, a node; 0 trains on CPUs with cpu_ranks_per_node"""
    cpu_ranks_per_node: Annotated[int, Unit("ranks", ge=1)] = 1
    """Ranks a node where gpus_per_node is 0"""
    exclusive: bool = True
    """Share the nodes with no other job; false leaves it to options, such as --exclusive=user"""
    time: str | None = None
    """Time limit, such as 4:00:00 or 2-00:00:00; null takes the partition's"""
    signal_before_s: Annotated[int, Unit("s", ge=1, le=65535)] = 600
    """Time before the limit at which the run is asked to save and stop; longer than a step and a
    save. Slurm may be a minute early"""
    partition: str | None = None
    """Partition"""
    account: str | None = None
    """Account"""
    qos: str | None = None
    """Quality of service"""
    constraint: str | None = None
    """Features of nodes"""
    exclude: str | None = None
    """Nodes not to use"""
    options: list[str] = []
    """Further options of sbatch, such as --reservation=NAME"""
    max_requeues: Annotated[int, Unit("requeues", ge=0)] = 20
    """Maximum requeues of the job; enough for weeks of time limits"""
    max_restarts: Annotated[int, Unit("restarts", ge=0)] = 3
    """Maximum restarts of all ranks inside the job after one of a node has died; each node counts
    its own"""
    restart_timeout_s: Annotated[int, Unit("s", ge=1)] = 120
    """Time that nodes wait inside the job for one whose ranks have died; then the job is
    requeued"""
    requeue_on_failure: bool = False
    """Start again also after a failure with a traceback, not only after a request to stop, a hang
    or a lost node"""
    preflight: bool = True
    """Check every node before training; nodes that fail are excluded"""
    preflight_command: list[str] = []
    """Check of a node: runs once on each, fails on a sick one and says why; empty means moepp
    doctor --preflight"""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """Container runtime"""
    container_image: FilledText | None = None
    """Image, in which the command moepp is installed"""
    container_mounts: list[str] = []
    """Folders to mount as SOURCE:TARGET; the working folder is mounted anyway"""

    own_rules = (
        each(
            values("slurm.partition slurm.account slurm.qos slurm.constraint slurm.exclude"),
            lambda value: value is not None and not _NAME.fullmatch(value),
            "must hold only letters, digits and _.,:&|()[]*%+-",
            "use a name that this cluster has, or null",
        ),
        each(
            values("slurm.time"),
            lambda time: time is not None and not _TIME.fullmatch(time),
            "must be minutes, hours:minutes:seconds or days-hours:minutes:seconds",
            'write for example "4:00:00" or "2-00:00:00"',
        ),
        # A job is not asked to stop as soon as it starts.
        refuse(
            "slurm.signal_before_s",
            lambda c: 0 < _limit(c) <= c.slurm.signal_before_s,
            lambda c: f"must be below slurm.time ({c.slurm.time}, {_limit(c)} s)",
            "lower it, or raise the time limit",
        ),
        refuse(
            "slurm.min_nodes",
            lambda c: (c.slurm.min_nodes or 0) > c.slurm.nodes,
            "must be at most slurm.nodes ({slurm.nodes})",
            "use {slurm.nodes} or less, or null",
        ),
        refuse(
            "slurm.container_image",
            "not slurm.container none and not slurm.container_image",
            "must name an image for slurm.container ({slurm.container})",
            "name one, or use slurm.container none",
        ),
        refuse(
            "slurm.container_image",
            "slurm.container none and slurm.container_image",
            "must come with slurm.container pyxis or apptainer",
            "set slurm.container, or leave the image out",
        ),
        each(
            entries("slurm.options"),
            lambda option: not option.startswith("--") or not option.isprintable(),
            "must be a long option of sbatch on one line",
            "write it as --name=value",
        ),
        # Container runtimes separate mounts by commas and their halves by colons.
        each(
            entries("slurm.container_mounts"),
            lambda mount: ":" not in mount or "," in mount,
            "must have the form SOURCE:TARGET without a comma",
            "mount a folder whose name has none",
        ),
    )
