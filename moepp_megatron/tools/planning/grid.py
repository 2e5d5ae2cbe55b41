"""A layout as plain integers, cheap enough to try a hundred thousand of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moepp_megatron.config import Config
from moepp_megatron.config.stages import virtual_stages

Recompute = tuple[str, ...]
# What is kept in bf16 between steps: `_LOWERED` of `overlay.py` has the settings.
States = tuple[Literal["moments", "gradients"], ...]
Dispatcher = Literal["alltoall", "alltoall_dedup", "allgather", "flex"]
# What `recompute` holds for whole layers; a tuple of modules otherwise, () for nothing.
FULL: Recompute = ("full",)


@dataclass(frozen=True, slots=True)
class Grid:
    """Degrees of parallelism and what else a layout decides."""

    world: int  # ranks
    tp: int = 1  # tensor-parallel ranks; sequence parallelism with more than one
    cp: int = 1  # context-parallel ranks
    pp: int = 1  # pipeline ranks
    vpp: int = 1  # model chunks of a pipeline rank
    ep: int = 1  # expert-parallel ranks
    etp: int = 1  # tensor-parallel ranks of an FFN expert
    micro_batch: int = 1  # sequences of a micro-batch
    recompute: Recompute = ()  # modules that the backward pass recomputes, FULL for whole layers
    expert_overlap: bool = False  # expert all-to-all runs during another micro-batch's computation
    distributed_optimizer: bool = True  # optimizer state is sharded over data-parallel ranks
    grad_overlap: bool = True  # gradients are reduced during the backward pass
    param_overlap: bool = True  # parameters are gathered during the forward pass
    # Layers of each model chunk that FULL recomputes; None for all.
    recomputed_layers: int | None = None
    # The schedule is DualPipe (arXiv 2412.19437, section 3.2.1), not interleaved.
    is_dualpipe: bool = False
    dispatcher: Dispatcher | None = None  # name of the dispatcher, where a search chose it
    states: States = ()  # what a search keeps in bf16 beyond the configuration
    unpaired: bool = False  # stands for the unpaired passes of the combined schedule

    @classmethod
    def from_config(cls, config: Config, world: int) -> Grid:
        """The grid of a configuration that no rule has checked, on this many ranks."""
        parallel, training = config.parallel, config.training
        recompute: Recompute = ()
        some: int | None = None
        if training.recompute_granularity == "full":
            recompute = FULL
            if training.recompute_method == "block":
                some = training.recompute_num_layers
        elif training.recompute_granularity == "selective":
            recompute = tuple(sorted(training.recompute_modules))
        return cls(
            world=world,
            tp=parallel.tensor_model_parallel_size,
            cp=parallel.context_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            vpp=virtual_stages(config),
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_size,
            micro_batch=training.micro_batch_size,
            recompute=recompute,
            expert_overlap=parallel.overlap_moe_expert_parallel_comm,
            distributed_optimizer=parallel.use_distributed_optimizer,
            grad_overlap=parallel.overlap_grad_reduce,
            param_overlap=parallel.overlap_param_gather,
            recomputed_layers=some,
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
    def shards(self) -> tuple[int, int]:
        """Ranks that share an optimizer's state: of everything but FFN experts, and of these."""
        return (self.dp * self.cp, self.edp) if self.distributed_optimizer else (1, 1)

    @property
    def splits(self) -> list[str]:
        """The degrees above 1 of what splits the model and its sequences, such as TP2, EP64."""
        names = ("tp", "cp", "pp", "vpp", "ep", "etp")
        return [f"{name.upper()}{getattr(self, name)}" for name in names if getattr(self, name) > 1]

    @property
    def recomputes_all(self) -> bool:
        """Whole layers are recomputed."""
        return self.recompute == FULL

    @property
    def apart(self) -> Grid:
        """The same layout in the unpaired passes of the combined schedule."""
        return replace(self, expert_overlap=False, unpaired=self.expert_overlap)

    @property
    def layer_key(self) -> Grid:
        """The grid without what a layer's time and bytes do not depend on: the key of caches."""
        return Grid(
            self.tp * self.cp * self.ep * self.etp,
            self.tp,
            self.cp,
            ep=self.ep,
            etp=self.etp,
            micro_batch=self.micro_batch,
            recompute=self.recompute,
            expert_overlap=self.expert_overlap,
            recomputed_layers=self.recomputed_layers,
            unpaired=self.unpaired,
        )

    def micro_batches(self, batch: int) -> int:
        """Micro-batches of a step and data-parallel rank."""
        return batch // (self.micro_batch * self.dp)

    def tokens(self, seq: int) -> int:
        """Tokens of a micro-batch that a rank routes, T."""
        return seq * self.micro_batch // (self.cp * self.tp)
