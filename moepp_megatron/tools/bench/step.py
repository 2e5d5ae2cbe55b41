"""`moepp bench step`: whole training steps, MoE++ and vanilla in turn on the same ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.moe.router import MoEPPRouter
from moepp_megatron.tools.bench.clock import interleaved, speedup
from moepp_megatron.tools.bench.held_routing import balanced_selection, balanced_shares, hold
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.setup import build_training_model
from moepp_megatron.training.step import training_step


@dataclass(frozen=True)
class TimedStep:
    """Both models' steps.

    Attributes:
        ranks: Ranks of the run.
        tau: Weight of a zero-computation expert in the balance.
        phi: FFN experts' share of all selections, as the routing was held.
        measured_ffn_fraction: The counted share.
        tokens: Tokens of a step, over all ranks.
        vanilla_ms: Median milliseconds per step.
        moepp_ms: The same of MoE++.
        speedup: Vanilla time over MoE++ time, median of the rounds' ratios.
        vanilla_a2a_bytes: Hidden vectors' bytes that leave their ranks in a step's forward passes.
        moepp_a2a_bytes: The same of MoE++.
    """

    ranks: int
    tau: float
    phi: float
    measured_ffn_fraction: float
    tokens: int
    vanilla_ms: float
    moepp_ms: float
    speedup: float
    vanilla_a2a_bytes: int
    moepp_a2a_bytes: int


class _Stepper:
    """A model with random tokens, its routing held at perfect balance.

    Args:
        config: The model.
        layout: The rank grid; groups exist.
    """

    def __init__(self, config: Config, layout: Layout) -> None:
        self._config, self._layout = config, layout
        self._model = build_training_model(config)
        self._model.set_training(True)
        tokens = RandomTokens(config)
        self._batches = rank_batches(tokens, 0, config, len(self._model.chunks))
        self.routing = RoutingCountsPart(self._model, config, layout)
        _hold_all(self._model.models, config, layout)

    def step(self) -> None:
        """One optimizer step; ends when every rank has ended it."""
        self.routing.reset()
        training_step(self._model, self._batches, self._config, self._layout)
        dist.barrier()


def run_step_benchmark(config: Config, layout: Layout, rounds: int) -> TimedStep:
    """Measure; every rank must call, and all get the result of their own clock.

    Args:
        config: A MoE++ configuration.
        layout: The rank grid; groups exist.
        rounds: Steps of each model that count; two before them do not.
    """
    steppers = {"vanilla": _Stepper(vanilla(config), layout), "moepp": _Stepper(config, layout)}
    times = interleaved({n: s.step for n, s in steppers.items()}, rounds, warmup=2)
    counted = {name: stepper.routing.collect() for name, stepper in steppers.items()}
    training, moe = config.training, config.moe
    return TimedStep(
        ranks=layout.world_size,
        tau=moe.tau,
        phi=moe.ffn_share,
        measured_ffn_fraction=float(counted["moepp"]["ffn_fraction"]),  # type: ignore[arg-type]
        tokens=training.global_batch_size * config.model.seq_length,
        vanilla_ms=times["vanilla"].median_ms,
        moepp_ms=times["moepp"].median_ms,
        speedup=speedup(times["vanilla"], times["moepp"]),
        vanilla_a2a_bytes=int(counted["vanilla"]["a2a_bytes"]),  # type: ignore[call-overload]
        moepp_a2a_bytes=int(counted["moepp"]["a2a_bytes"]),  # type: ignore[call-overload]
    )


def _hold_all(models: list[torch.nn.Module], config: Config, layout: Layout) -> None:
    moe, training = config.moe, config.training
    num_tokens = training.micro_batch_size * config.model.seq_length // (layout.tp * layout.cp)
    generator = torch.Generator().manual_seed(training.seed + dist.get_rank())
    for model in models:
        for router in model.modules():
            if isinstance(router, TopKRouter):
                zero_computation = (
                    moe.num_zero_computation_experts if isinstance(router, MoEPPRouter) else 0
                )
                shares = balanced_shares(moe.num_ffn_experts, zero_computation, moe.tau)
                picks = balanced_selection(num_tokens, shares, moe.router_topk, generator)
                hold(router, picks)


class RandomTokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A data set without end for a model's sequences; each depends on its index only."""

    def __init__(self, config: Config) -> None:
        self._model = config.model

    def __len__(self) -> int:
        """More than any run reads."""
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence."""
        length = self._model.seq_length
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(self._model.vocab_size, (length + 1,), generator=generator)
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(length),
            "position_ids": torch.arange(length),
        }
