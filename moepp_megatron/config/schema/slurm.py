"""Section `slurm`: what `moepp slurm` asks the scheduler for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, Unit


class SlurmSection(Section):
    """A job of this run on a Slurm cluster; has no effect on training itself."""

    nodes: Annotated[int, Unit("nodes"), Field(ge=1)] = 1
    """Nodes of the job"""
    min_nodes: Annotated[int | None, Unit("nodes"), Field(ge=1)] = None
    """Fewest nodes that the job continues with when some are lost; null waits for all"""
    gpus_per_node: Annotated[int, Unit("GPUs"), Field(ge=0)] = 8
    """GPUs, and so ranks, a node; 0 trains on CPUs with cpu_ranks_per_node"""
    cpu_ranks_per_node: Annotated[int, Unit("ranks"), Field(ge=1)] = 1
    """Ranks a node where gpus_per_node is 0"""
    exclusive: Annotated[bool, Unit("-")] = True
    """Share the nodes with no other job; false leaves it to options, such as --exclusive=user"""
    time: Annotated[str | None, Unit("-")] = None
    """Time limit, such as 4:00:00 or 2-00:00:00; null takes the partition's"""
    signal_before_s: Annotated[int, Unit("s"), Field(ge=1, le=65535)] = 600
    """Time before the limit at which the run is asked to save and stop; longer than a step and a
    save. Slurm may be a minute early"""
    partition: Annotated[str | None, Unit("-")] = None
    """Partition"""
    account: Annotated[str | None, Unit("-")] = None
    """Account"""
    qos: Annotated[str | None, Unit("-")] = None
    """Quality of service"""
    constraint: Annotated[str | None, Unit("-")] = None
    """Features of nodes"""
    exclude: Annotated[str | None, Unit("-")] = None
    """Nodes not to use"""
    options: Annotated[list[str], Unit("-")] = []
    """Further options of sbatch, such as --reservation=NAME"""
    max_requeues: Annotated[int, Unit("requeues"), Field(ge=0)] = 20
    """Maximum requeues of the job; enough for weeks of time limits"""
    max_restarts: Annotated[int, Unit("restarts"), Field(ge=0)] = 3
    """Maximum restarts of all ranks inside the job after one of a node has died; each node counts
    its own"""
    restart_timeout_s: Annotated[int, Unit("s"), Field(ge=1)] = 120
    """Time that nodes wait inside the job for one whose ranks have died; then the job is
    requeued"""
    requeue_on_failure: Annotated[bool, Unit("-")] = False
    """Start again also after a failure with a traceback, not only after a request to stop, a hang
    or a lost node"""
    preflight: Annotated[bool, Unit("-")] = True
    """Check every node before training; nodes that fail are excluded"""
    preflight_command: Annotated[list[str], Unit("-")] = []
    """Check of a node: runs once on each, fails on a sick one and says why; empty means moepp
    doctor --preflight"""
    container: Annotated[Literal["none", "pyxis", "apptainer"], Unit("-")] = "none"
    """Container runtime"""
    container_image: Annotated[str | None, Unit("-"), Field(min_length=1)] = None
    """Image, in which the command moepp is installed"""
    container_mounts: Annotated[list[str], Unit("-")] = []
    """Folders to mount as SOURCE:TARGET; the working folder is mounted anyway"""
