"""This rank, read from the launcher's environment. Imports nothing heavy."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from moepp_megatron.config.errors import ConfigError

# This machine's number among those of the run, from the launcher (`runtime.nodes.Nodes.rank`).
NODE_RANK = "MOEPP_NODE_RANK"
# What distinguishes one start of ranks by srun from any other.
_SLURM_START = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set variables of this process's environment in the block, and unset those that are None."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@dataclass(frozen=True)
class RankEnvironment:
    """This process among the ranks of a run.

    Attributes:
        is_launched: True if torchrun, a launcher that sets the same variables, or srun started it.
        restart_count: Restarts of the ranks by torchrun so far.
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

    def check_nproc(self, nproc: int) -> None:
        """Refuse (ConfigError) `--nproc` for a rank, unless it is the number of ranks here."""
        if self.is_launched and nproc not in (1, self.local_world_size):
            raise ConfigError(
                f"--nproc ({nproc}) must not be given to ranks of srun or torchrun, which has "
                f"started {self.world_size}, {self.local_world_size} on this machine; start "
                f"{nproc} tasks on each machine without it, or add --nnodes and --rdzv-endpoint"
            )

    @classmethod
    def read(cls) -> "RankEnvironment":
        """Read the variables that torchrun or srun sets; without them this is a lone process.

        ConfigError if a user's own launcher does not say which ranks share this machine.
        """
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls._of_torchrun(env)
        # A step of one task is a shell or a launcher inside an allocation, not a rank.
        if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
            return cls._of_srun(env)
        return cls()

    @classmethod
    def _of_torchrun(cls, env: Mapping[str, str]) -> "RankEnvironment":
        rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        local_rank, local_world_size = _place_on_machine(env, rank, world_size)
        meets_at = None
        if env.get("TORCHELASTIC_USE_AGENT_STORE") == str(False):
            # torchrun's own rank 0 is on the machine whose address it handed out, whatever number
            # that machine has here.
            meets_at = env["MASTER_ADDR"], _number(env, "MASTER_PORT"), rank == 0
        if NODE_RANK in env:
            # torchrun numbers machines by the text of their addresses: 10.0.0.10 before 10.0.0.9.
            rank = _number(env, NODE_RANK) * local_world_size + local_rank
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=local_world_size,
            is_launched=True,
            restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            start_name=env.get("TORCHELASTIC_RUN_ID", "none"),
            meets_at=meets_at,
        )

    @classmethod
    def _of_srun(cls, env: Mapping[str, str]) -> "RankEnvironment":
        rank, world_size = _number(env, "SLURM_PROCID"), _number(env, "SLURM_STEP_NUM_TASKS")
        local_world_size = _tasks_on_node(env)
        # Ranks of one machine need no name of it, which may be no address.
        first = "127.0.0.1" if local_world_size == world_size else None
        host = env.get("MASTER_ADDR") or first or _first_host(env["SLURM_STEP_NODELIST"])
        # Derived from the job, so that all ranks know it and two jobs rarely share one; below those
        # that Linux hands out to connections.
        port = _number(env, "MASTER_PORT", 20000 + _number(env, "SLURM_JOB_ID") % 12000)
        if not 0 < port < 65536:
            raise ConfigError(
                f"MASTER_PORT ({port}) must be a port, 1 to 65535; export another, or unset it"
            )
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_number(env, "SLURM_LOCALID"),
            local_world_size=local_world_size,
            is_launched=True,
            start_name=".".join(env.get(name, "0") for name in _SLURM_START),
            meets_at=(host, port, rank == 0),
        )


def _first_host(nodes: str) -> str:
    """The first host of a Slurm host list, such as `gpu07` of `gpu[07-09,12],login1`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None, "the pattern matches anything"
    return "".join(part or "" for part in match.groups())


def _place_on_machine(env: Mapping[str, str], rank: int, world_size: int) -> tuple[int, int]:
    """This rank's number on its machine, and how many ranks are there."""
    if "LOCAL_RANK" in env and "LOCAL_WORLD_SIZE" in env:
        return _number(env, "LOCAL_RANK"), _number(env, "LOCAL_WORLD_SIZE")
    if world_size == 1:
        return _number(env, "LOCAL_RANK", rank), 1
    if env.get("SLURM_STEP_NUM_TASKS") == str(world_size):
        return _number(env, "SLURM_LOCALID"), _tasks_on_node(env)
    raise ConfigError(
        f"WORLD_SIZE ({world_size}) must come with LOCAL_RANK and LOCAL_WORLD_SIZE, a rank's "
        "number on its machine and the number of ranks there; export both, or start ranks with "
        "torchrun, srun or --nproc"
    )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable of the environment; one that is set to nothing counts as unset."""
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name} ({text!r}) in the environment must be a whole number; unset it, or start "
            "ranks with torchrun, srun or --nproc, which set it"
        ) from None


def _tasks_on_node(env: Mapping[str, str]) -> int:
    """This node's entry of SLURM_STEP_TASKS_PER_NODE, such as `8(x2),4`."""
    counts: list[int] = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, repeats = part.partition("(x")
        counts += [int(tasks)] * int(repeats.rstrip(")") or 1)
    return counts[_number(env, "SLURM_NODEID", 0)]
