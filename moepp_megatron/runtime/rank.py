"""What the launcher told this process about itself. Imports nothing heavy."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnvironment:
    """This process among the ranks of a run.

    Attributes:
        rank: From 0.
        world_size: Ranks of the run.
        local_rank: Rank on this node.
        local_world_size: Ranks on this node.
        is_launched: Whether torchrun (or a launcher that sets the same variables) started it.
        restart_count: How often torchrun has started the ranks anew.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_launched: bool = False
    restart_count: int = 0

    @classmethod
    def read(cls) -> RankEnvironment:
        """From the variables that torchrun sets; a lone process where there are none."""
        env = os.environ
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return cls()
        world_size = int(env["WORLD_SIZE"])
        return cls(
            rank=int(env["RANK"]),
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", world_size)),
            is_launched=True,
            restart_count=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
