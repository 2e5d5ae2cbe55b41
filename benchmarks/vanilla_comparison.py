r"""Trains MoE++ and a vanilla MoE of the same FFN experts in turn, on the same tokens.

Both models live on the same ranks and take their steps alternately, so that whatever else the
machine does meets both alike: compare the ratio of the step times, not the times.

    torchrun --standalone --nproc-per-node 2 benchmarks/vanilla_comparison.py \\
        configs/quickstart.yaml [section.key=value ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

from moepp_megatron.runtime.quiet import quiet

quiet()

import torch.distributed as dist  # noqa: E402

from moepp_megatron.config import Config, Layout, load_config, with_overrides  # noqa: E402
from moepp_megatron.data.datasets import build_datasets  # noqa: E402
from moepp_megatron.data.tokenizer import Tokenizer  # noqa: E402
from moepp_megatron.runtime import distributed  # noqa: E402
from moepp_megatron.runtime.rank import RankEnvironment  # noqa: E402
from moepp_megatron.training.batches import rank_batches  # noqa: E402
from moepp_megatron.training.collect import RoutingCollector, mean_loss  # noqa: E402
from moepp_megatron.training.evaluate import validation_loss  # noqa: E402
from moepp_megatron.training.setup import build_training_model  # noqa: E402
from moepp_megatron.training.step import training_step  # noqa: E402


def vanilla(config: Config) -> Config:
    """The same model without zero-computation experts and gating residual.

    megatron-core's balance loss is E / K times the paper's, so its coefficient is that much smaller
    for the same strength.
    """
    moe = config.moe
    coefficient = moe.balance_coeff * moe.router_topk / moe.num_ffn_experts
    return with_overrides(
        config,
        [
            "moe.num_zero_experts=0",
            "moe.num_copy_experts=0",
            "moe.num_constant_experts=0",
            "moe.gating_residual=false",
            f"moe.balance_coeff={coefficient}",
        ],
    )


class Contestant:
    """One of the two models, its data and what it measured."""

    def __init__(self, name: str, config: Config, layout: Layout) -> None:
        self.name, self.config, self.layout = name, config, layout
        self.model = build_training_model(config)
        path = Path(str(config.data.path))
        batch = config.training.global_batch_size
        self.train_set, self.valid_set, _ = build_datasets(
            path,
            Tokenizer.load(path / "tokenizer.json"),
            config.model.seq_length,
            config.data.split,
            config.training.seed,
            (config.training.train_iters * batch, config.training.eval_iters * batch, 0),
        )
        self.batches = rank_batches(self.train_set, 0, config, len(self.model.chunks))
        self.routing = RoutingCollector(self.model, config, layout)
        self.model.set_training(True)
        self.times: list[float] = []
        self.losses: list[float] = []
        self.ffn_fractions: list[float] = []

    def step(self) -> None:
        """Take one step and time it."""
        self.routing.reset()
        dist.barrier()
        started = time.perf_counter()
        result = training_step(self.model, self.batches, self.config, self.layout)
        dist.barrier()
        self.times.append(time.perf_counter() - started)
        self.losses.append(mean_loss(result.losses))
        self.ffn_fractions.append(float(self.routing.collect()["ffn_fraction"]))  # type: ignore[arg-type]

    def validation(self) -> float:
        """Validation loss now."""
        return validation_loss(self.model, self.valid_set, self.config, self.layout)


def main() -> None:
    """Run both to `training.train_iters` and print what came of it."""
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    rank = RankEnvironment.read()
    distributed.start(rank)
    layout = Layout.from_config(config, rank.world_size)
    distributed.build_groups(config, layout)
    moepp, rival = (
        Contestant(name, c, layout) for name, c in (("MoE++", config), ("vanilla", vanilla(config)))
    )
    for step in range(1, config.training.train_iters + 1):
        for contestant in (moepp, rival) if step % 2 else (rival, moepp):
            contestant.step()
        if rank.rank == 0 and step % 20 == 0:
            losses = ", ".join(f"{c.name} {c.losses[-1]:.4f}" for c in (moepp, rival))
            print(f"step {step}: {losses}", flush=True)
    results = [(c, c.validation()) for c in (moepp, rival)]
    if rank.rank == 0:
        for contestant, valid_loss in results:
            late = contestant.losses[-10:]
            print(
                f"{contestant.name}: loss {statistics.mean(late):.4f} (last 10 steps), validation "
                f"{valid_loss:.4f}, median step {statistics.median(contestant.times):.3f} s, "
                f"FFN share {statistics.mean(contestant.ffn_fractions[-10:]):.3f}"
            )
        ratios = [v / m for m, v in zip(moepp.times, rival.times, strict=True)]
        print(
            f"vanilla step time / MoE++ step time, median of pairs: {statistics.median(ratios):.3f}"
        )
    distributed.stop()


if __name__ == "__main__":
    main()
