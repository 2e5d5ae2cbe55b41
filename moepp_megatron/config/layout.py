"""The rank grid: degrees of parallelism, micro-batches, and the coordinates of each rank."""

from __future__ import annotations

from dataclasses import dataclass

from moepp_megatron.config.checks import check_world_size
from moepp_megatron.config.schema import Config
from moepp_megatron.config.stages import virtual_stages


@dataclass(frozen=True)
class RankCoordinates:
    """Coordinates of one rank in the grid, each from 0.

    Attention and dense layers use (tp, cp, dp, pp), FFN experts (etp, ep, edp, pp).
    """

    rank: int
    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    edp: int


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a run; tp*cp*dp*pp = etp*ep*edp*pp = world_size.

    The letters stand for tensor, context, data, pipeline and expert parallelism; FFN experts have
    etp and edp in place of tp and dp. `vpp` is the number of model chunks per pipeline rank, 1
    without interleaving. `num_microbatches` counts those of a step and data-parallel rank.
    """

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int
    num_microbatches: int

    @classmethod
    def from_config(cls, config: Config, world_size: int) -> Layout:
        """Lay `config` out on `world_size` ranks; ConfigError if it does not fit them."""
        check_world_size(config, world_size)
        parallel = config.parallel
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
        etp = parallel.expert_tensor_size
        dp = world_size // (tp * pp * cp)
        return cls(
            world_size=world_size,
            tp=tp,
            pp=pp,
            vpp=virtual_stages(config),
            cp=cp,
            dp=dp,
            ep=ep,
            etp=etp,
            edp=world_size // (etp * ep * pp),
            num_microbatches=config.training.global_batch_size
            // (config.training.micro_batch_size * dp),
        )

    def coordinates(self, rank: int) -> RankCoordinates:
        """The coordinates of `rank`.

        megatron-core numbers ranks in the order "tp-cp-ep-dp-pp", the first fastest: attention
        with ep = 1, experts with cp = 1 (megatron/core/parallel_state.py, `RankGenerator`).
        """
        assert 0 <= rank < self.world_size, f"rank {rank} of {self.world_size}"
        pp, within_stage = divmod(rank, self.world_size // self.pp)
        return RankCoordinates(
            rank=rank,
            tp=within_stage % self.tp,
            cp=within_stage // self.tp % self.cp,
            dp=within_stage // (self.tp * self.cp),
            pp=pp,
            etp=within_stage % self.etp,
            ep=within_stage // self.etp % self.ep,
            edp=within_stage // (self.etp * self.ep),
        )
