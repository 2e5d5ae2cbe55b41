"""Section `slurm`: what `moepp slurm` asks the scheduler for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moepp_megatron.config.schema.section import Section, unit


class SlurmSection(Section):
    """A job of this run on a Slurm cluster; has no effect on training itself."""

    nodes: int = Field(
        default=1, ge=1, description="Nodes of the job", json_schema_extra=unit("nodes")
    )
    min_nodes: int | None = Field(
        default=None,
        ge=1,
        description="Fewest nodes that the job goes on with when some are lost; null waits for all",
        json_schema_extra=unit("nodes"),
    )
    gpus_per_node: int = Field(
        default=8,
        ge=0,
        description="GPUs, and so ranks, a node; 0 trains on CPUs with cpu_ranks_per_node",
        json_schema_extra=unit("GPUs"),
    )
    cpu_ranks_per_node: int = Field(
        default=1,
        ge=1,
        description="Ranks a node where gpus_per_node is 0",
        json_schema_extra=unit("ranks"),
    )
    exclusive: bool = Field(
        default=True,
        description="Share the nodes with no other job",
        json_schema_extra=unit("-"),
    )
    time: str | None = Field(
        default=None,
        description="Time limit, such as 4:00:00 or 2-00:00:00; null takes the partition's",
        json_schema_extra=unit("-"),
    )
    signal_before_s: int = Field(
        default=600,
        ge=1,
        le=65535,
        description="How long before the time limit the run is asked to save and stop; longer than "
        "a step and a save. Slurm may be a minute early",
        json_schema_extra=unit("s"),
    )
    partition: str | None = Field(
        default=None, description="Partition", json_schema_extra=unit("-")
    )
    account: str | None = Field(default=None, description="Account", json_schema_extra=unit("-"))
    qos: str | None = Field(
        default=None, description="Quality of service", json_schema_extra=unit("-")
    )
    constraint: str | None = Field(
        default=None, description="Features of nodes", json_schema_extra=unit("-")
    )
    exclude: str | None = Field(
        default=None, description="Nodes not to use", json_schema_extra=unit("-")
    )
    options: list[str] = Field(
        default=[],
        description="Further options of sbatch, such as --reservation=NAME",
        json_schema_extra=unit("-"),
    )
    max_requeues: int = Field(
        default=20,
        ge=0,
        description="How often the job may start again; enough for weeks of time limits",
        json_schema_extra=unit("requeues"),
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="How often all ranks start anew inside the job after one of a node has died; "
        "each node counts its own",
        json_schema_extra=unit("restarts"),
    )
    restart_timeout_s: int = Field(
        default=120,
        ge=1,
        description="How long nodes wait inside the job for a node whose ranks have died; then the "
        "job is requeued",
        json_schema_extra=unit("s"),
    )
    requeue_on_failure: bool = Field(
        default=False,
        description="Start again also after a failure with a traceback, not only after a request "
        "to stop, a hang or a lost node",
        json_schema_extra=unit("-"),
    )
    preflight: bool = Field(
        default=True,
        description="Check every node before training; nodes that fail are excluded",
        json_schema_extra=unit("-"),
    )
    preflight_command: list[str] = Field(
        default=[],
        description="What checks a node: runs once on each, fails on a sick one and says why; "
        "empty means moepp doctor --preflight",
        json_schema_extra=unit("-"),
    )
    container: Literal["none", "pyxis", "apptainer"] = Field(
        default="none", description="What runs the container", json_schema_extra=unit("-")
    )
    container_image: str | None = Field(
        default=None,
        min_length=1,
        description="Image, in which the command moepp is installed",
        json_schema_extra=unit("-"),
    )
    container_mounts: list[str] = Field(
        default=[],
        description="Folders to mount as SOURCE:TARGET; the working folder is mounted anyway",
        json_schema_extra=unit("-"),
    )
