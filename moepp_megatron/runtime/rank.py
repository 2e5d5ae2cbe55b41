"""What the launcher's environment says about this rank. Imports nothing heavy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from moepp_megatron.config.errors import ConfigError

# This machine's number among those of the run, from the launcher (`runtime.nodes.Nodes.rank`).
NODE_RANK = "MOEPP_NODE_RANK"
# What tells one start of ranks by srun from any other.
_SLURM_START = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


@dataclass(frozen=True)
class RankEnvironment:
    """This process among the ranks of a run.

    Attributes:
        is_launched: Whether torchrun, a launcher that sets the same variables, or srun started it.
        restart_count: How often torchrun has started the ranks anew.
        start_name: Name of this start of the run, the same on all its ranks; None for a lone
            process.
        meets_at: Host and port of the store where ranks meet, and whether this rank serves it;
            None to take what torch finds in the environment.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_launched: bool = False
    restart_count: int = 0
    start_name: str | None = None
    meets_at: tuple[str, int, bool] | None = None

    @classmethod
    def read(cls) -> RankEnvironment:
        """Read the variables that torchrun or srun sets; without them this is a lone process.

        ConfigError if a user's own launcher does not say which ranks share this machine.
        """
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls._of_torchrun(env)
        # A step of one task is a shell or a launcher inside an allocation, not a rank.
        if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return cls._of_srun(env)
        return cls()

    @classmethod
    def _of_torchrun(cls, env: Mapping[str, str]) -> RankEnvironment:
        rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        local_rank, local_world_size = _place_on_machine(env, rank, world_size)
        meets_at = None
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == str(False):
            # torchrun's own rank 0 is on the machine whose address it handed out, whatever number
            # that machine has here.
            meets_at = env["MASTER_ADDR"], int(env["MASTER_PORT"]), rank == 0
        if NODE_RANK in env:
            # torchrun numbers machines by the text of their addresses: 10.0.0.10 before 10.0.0.9.
            rank = int(env[NODE_RANK]) * local_world_size + local_rank
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            is_launched=True,
            restart_count=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            start_name=env.get("TORCHELASTIC_RUN_ID", "none"),
            meets_at=meets_at,
        )

    @classmethod
    def _of_srun(cls, env: Mapping[str, str]) -> RankEnvironment:
        rank, world_size = int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
        host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
        # Derived from the job, so that all ranks know it and two jobs rarely share one; below those
        # that Linux hands out to connections.
        port = int(env.get("MASTER_PORT", 20000 + int(env["SLURM_JOB_ID"]) % 12000))
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=_tasks_on_node(env),
            is_launched=True,
            start_name=".".join(env.get(name, "0") for name in _SLURM_START),
            meets_at=(host, port, rank == 0),
        )


def first_host(nodes: str) -> str:
    """The first host of a Slurm host list, such as `gpu07` of `gpu[07-09,12],login1`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None, "the pattern matches anything"
    return "".join(part or "" for part in match.groups())


def _place_on_machine(env: Mapping[str, str], rank: int, world_size: int) -> tuple[int, int]:
    """This rank's number on its machine, and how many ranks are there."""
    if "LOCAL_RANK" in env and "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_RANK"]), int(env["LOCAL_WORLD_SIZE"])
    if world_size == 1:
        return int(env.get("LOCAL_RANK", rank)), 1
    if env.get("SLURM_STEP_NUM_TASKS") == str(world_size):
        return int(env["SLURM_LOCALID"]), _tasks_on_node(env)
    raise ConfigError(
        f"WORLD_SIZE ({world_size}) must come with LOCAL_RANK and LOCAL_WORLD_SIZE, a rank's "
        "number on its machine and the number of ranks there; export both, or start ranks with "
        "torchrun, srun or --nproc"
    )


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, such as `8(x2),4`."""
    counts: list[int] = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, repeats = part.partition("(x")
        counts += [int(tasks)] * int(repeats.rstrip(")") or 1)
    return counts[int(env.get("SLURM_NODEID", "0"))]
