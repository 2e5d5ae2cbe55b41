"""A layout as plain integers, cheap enough to try a hundred thousand of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moepp_megatron.config import Config, Layout

Recompute = tuple[str, ...]
# What `recompute` holds for whole layers; a tuple of modules otherwise, () for nothing.
FULL: Recompute = ("full",)


@dataclass(frozen=True, slots=True)
class Grid:
    """Degrees of parallelism and what else a layout decides.

    Attributes:
        world: Ranks.
        tp: Tensor-parallel ranks; sequence parallelism with more than one.
        cp: Context-parallel ranks.
        pp: Pipeline ranks.
        vpp: Model chunks of a pipeline rank.
        ep: Expert-parallel ranks.
        etp: Tensor-parallel ranks of an FFN expert.
        micro_batch: Sequences of a micro-batch.
        recompute: Modules that the backward pass recomputes, FULL for whole layers.
        expert_overlap: Expert all-to-all runs beside another micro-batch's computation.
        distributed_optimizer: Optimizer state is sharded over data-parallel ranks.
        grad_overlap: Gradients are reduced during the backward pass.
        param_overlap: Parameters are gathered during the forward pass.
    """

    world: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    recompute: Recompute = ()
    expert_overlap: bool = False
    distributed_optimizer: bool = True
    grad_overlap: bool = True
    param_overlap: bool = True

    @classmethod
    def from_layout(cls, config: Config, layout: Layout) -> Grid:
        """The grid of a configuration on its ranks."""
        parallel, training = config.parallel, config.training
        recompute: Recompute = ()
        if training.recompute_granularity == "full":
            recompute = FULL
        elif training.recompute_granularity == "selective":
            recompute = tuple(sorted(training.recompute_modules))
        return cls(
            world=layout.world_size,
            tp=layout.tp,
            cp=layout.cp,
            pp=layout.pp,
            vpp=layout.vpp,
            ep=layout.ep,
            etp=layout.etp,
            micro_batch=training.micro_batch_size,
            recompute=recompute,
            expert_overlap=parallel.overlap_moe_expert_parallel_comm,
            distributed_optimizer=parallel.use_distributed_optimizer,
            grad_overlap=parallel.overlap_grad_reduce,
            param_overlap=parallel.overlap_param_gather,
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks of everything but FFN experts."""
        return self.world // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel ranks of FFN experts."""
        return self.world // (self.ep * self.etp * self.pp)

    @property
    def splits(self) -> list[str]:
        """The degrees above 1 of what splits the model and its sequences, such as TP2, EP64."""
        degrees = {
            "TP": self.tp,
            "CP": self.cp,
            "PP": self.pp,
            "VPP": self.vpp,
            "EP": self.ep,
            "ETP": self.etp,
        }
        return [f"{name}{degree}" for name, degree in degrees.items() if degree > 1]

    @property
    def recomputes_all(self) -> bool:
        """Whole layers are recomputed."""
        return self.recompute == FULL

    @property
    def apart(self) -> Grid:
        """The same layout without computation beside the experts' exchange.

        It gives the cost of passes that the combined schedule runs alone.
        """
        return replace(self, expert_overlap=False)

    def micro_batches(self, batch: int) -> int:
        """Micro-batches of a step and data-parallel rank."""
        return batch // (self.micro_batch * self.dp)

    def tokens(self, seq: int) -> int:
        """Tokens of a micro-batch that a rank routes, T."""
        return seq * self.micro_batch // (self.cp * self.tp)


GroupName = Literal["tp", "cp", "dp", "pp", "etp", "ep", "edp", "dp_cp"]


def group_shape(grid: Grid, name: GroupName) -> tuple[int, int]:
    """Size of a process group and the distance between its neighbours in rank numbers.

    megatron-core numbers ranks in the order "tp-cp-ep-dp-pp", the first fastest: attention with
    ep = 1, experts with cp = 1 (megatron/core/parallel_state.py, `RankGenerator`).
    """
    within_stage = grid.world // grid.pp
    shapes = {
        "tp": (grid.tp, 1),
        "cp": (grid.cp, grid.tp),
        "dp": (grid.dp, grid.tp * grid.cp),
        "dp_cp": (grid.dp * grid.cp, grid.tp),
        "pp": (grid.pp, within_stage),
        "etp": (grid.etp, 1),
        "ep": (grid.ep, grid.etp),
        "edp": (grid.edp, grid.etp * grid.ep),
    }
    return shapes[name]
