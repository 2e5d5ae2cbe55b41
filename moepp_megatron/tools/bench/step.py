"""`moepp bench step`: whole training steps, MoE++ and vanilla in turn on the same ranks.

A result is what `--json` writes:

    ranks, tokens                 ranks of the run, and tokens of a step over all of them
    tau, phi                      weight of a zero-computation expert in the balance; FFN share
    measured_ffn_fraction         the counted share
    vanilla_ms, moepp_ms          median milliseconds per step
    speedup                       vanilla time over MoE++ time, median of the rounds' ratios
    static_rows_ms, static_rows_j the same of MoE++ with static rows, if moe.static_rows is set
    vanilla_j, moepp_j            mean J of a step on the first rank's GPU; null without NVML
    vanilla_a2a_bytes, moepp_a2a_bytes
                                  hidden vectors' bytes that leave their ranks in forward passes
    vanilla_a2a_time_s, moepp_a2a_time_s
                                  seconds of a step's all-to-alls, in steps that are not timed; null
                                  for dispatchers that exchange without `all_to_all_single`
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from moepp_megatron.config import Config, Layout
from moepp_megatron.config.vanilla import vanilla
from moepp_megatron.moe.lane import use_static_rows
from moepp_megatron.runtime.distributed import gathered
from moepp_megatron.runtime.nvml import Nvml, NvmlUnavailableError
from moepp_megatron.runtime.patches import replaced
from moepp_megatron.tools.bench.clock import interleaved, now, seconds, speedup, synchronize
from moepp_megatron.tools.bench.held_routing import balanced_selection, balanced_shares, hold
from moepp_megatron.training.batches import rank_batches
from moepp_megatron.training.parts.routing_counts import RoutingCountsPart
from moepp_megatron.training.setup import build_training_model
from moepp_megatron.training.step import training_step

_ALL_TO_ALL_STEPS = 3


class _Stepper:
    """A model with random tokens, its routing held at perfect balance; groups exist."""

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

    def static_step(self) -> None:
        """The same with static rows, of which a training run decides before each step."""
        for model in self._model.models:
            use_static_rows(model, True)
        self.step()
        for model in self._model.models:
            use_static_rows(model, False)

    def all_to_all_seconds(self) -> float | None:
        """Time the all-to-alls of a step, forward and backward: median of steps, mean over ranks.

        Each is waited for at once, so nothing hides behind computation; waiting for a late rank
        counts.
        """
        times = []
        for _ in range(_ALL_TO_ALL_STEPS):
            with _timed_all_to_alls() as ends:
                self.step()
            synchronize()
            times.append(sum(seconds(*pair) for pair in ends))
        if self._layout.ep > 1 and not any(times):
            return None
        return statistics.fmean(gathered(statistics.median(times)))


@contextmanager
def _timed_all_to_alls() -> Iterator[list[tuple[Any, Any]]]:
    """Take the begin and the end of every all-to-all among the ranks that share experts."""
    group = parallel_state.get_expert_model_parallel_group()
    ranks, original = dist.get_process_group_ranks(group), dist.all_to_all_single
    ends: list[tuple[Any, Any]] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        if dist.get_process_group_ranks(kwargs.get("group")) != ranks:
            return original(*args, **kwargs)
        began = now()
        work = original(*args, **kwargs)
        if work is not None:
            work.wait()
        ends.append((began, now()))
        return work

    with replaced(dist, all_to_all_single=timed):
        yield ends


def run_step_benchmark(config: Config, layout: Layout, rounds: int) -> dict[str, Any]:
    """Measure on existing groups; every rank must call, and each gets the result of its own clock.

    `config` is of MoE++. `rounds` steps of each model count; two before and three behind do not.
    """
    steppers = {"vanilla": _Stepper(vanilla(config), layout), "moepp": _Stepper(config, layout)}
    with _energy() as energy:
        contestants = {name: stepper.step for name, stepper in steppers.items()}
        if config.moe.static_rows is not None:
            contestants["static_rows"] = steppers["moepp"].static_step
        times = interleaved(contestants, rounds, warmup=2, energy=energy)
    counted = {name: stepper.routing.collect() for name, stepper in steppers.items()}
    waits = {f"{name}_a2a_time_s": each.all_to_all_seconds() for name, each in steppers.items()}
    training, moe = config.training, config.moe
    return {
        "ranks": layout.world_size,
        "tau": moe.tau,
        "phi": moe.ffn_share,
        "measured_ffn_fraction": counted["moepp"]["ffn_fraction"],
        "tokens": training.global_batch_size * config.model.seq_length,
        "speedup": speedup(times["vanilla"], times["moepp"]),
        **{f"{name}_ms": timed.median_ms for name, timed in times.items()},
        **{f"{name}_j": timed.joules for name, timed in times.items()},
        **{f"{name}_a2a_bytes": numbers["a2a_bytes"] for name, numbers in counted.items()},
        **waits,
    }


@contextmanager
def _energy() -> Iterator[Callable[[], float | None]]:
    """Yield a reader of the energy counter of this rank's GPU, J; it returns None without one."""
    with ExitStack() as stack:
        try:
            nvml = stack.enter_context(Nvml())
            index = nvml.visible()[torch.cuda.current_device()]
        except (NvmlUnavailableError, IndexError, TypeError):
            yield lambda: None
            return
        yield lambda: nvml.energies([index])[0]


def _hold_all(models: list[Any], config: Config, layout: Layout) -> None:
    moe, training = config.moe, config.training
    num_tokens = training.micro_batch_size * config.model.seq_length // (layout.tp * layout.cp)
    generator = torch.Generator().manual_seed(training.seed + dist.get_rank())
    shares = balanced_shares(moe.num_ffn_experts, moe.num_zero_computation_experts, moe.tau)
    for model in models:
        for router in model.modules():
            if isinstance(router, TopKRouter):
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
