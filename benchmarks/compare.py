r"""Trains variants of one model in turn, on the same tokens: losses and ratios of step times.

All models live on the same ranks and take their steps alternately, so that whatever else the
machine does meets all alike: compare the ratios of the step times, not the times. `vanilla` is the
model without zero-computation experts and gating residual.

    torchrun --standalone --nproc-per-node 2 benchmarks/compare.py configs/quickstart.yaml \\
        [section.key=value ...] [--variant NAME [section.key=value ...]] ...

Without a variant the baseline is `--variant vanilla`.
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
from moepp_megatron.config.vanilla import vanilla  # noqa: E402
from moepp_megatron.data.datasets import build_datasets  # noqa: E402
from moepp_megatron.data.tokenizer import Tokenizer  # noqa: E402
from moepp_megatron.runtime import distributed  # noqa: E402
from moepp_megatron.runtime.rank import RankEnvironment  # noqa: E402
from moepp_megatron.training.batches import rank_batches  # noqa: E402
from moepp_megatron.training.collect import RoutingCollector, mean_loss  # noqa: E402
from moepp_megatron.training.evaluate import validation_loss  # noqa: E402
from moepp_megatron.training.setup import build_training_model  # noqa: E402
from moepp_megatron.training.step import training_step  # noqa: E402


class Contestant:
    """One of the models, its data and what it measured."""

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

    def recent_loss(self) -> float:
        """Mean of the last ten steps."""
        return statistics.mean(self.losses[-10:])

    def validation(self) -> float:
        """Validation loss now."""
        return validation_loss(self.model, self.valid_set, self.config, self.layout)


def parse(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of all models, and those of each variant by its name."""
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--variant":
            groups.append([])
        else:
            groups[-1].append(argument)
    variants = {group[0]: group[1:] for group in groups[1:]}
    return groups[0], variants or {"vanilla": []}


def main() -> None:
    """Run all to `training.train_iters` and print what came of it."""
    overrides, variants = parse(sys.argv[2:])
    config = load_config(Path(sys.argv[1]), overrides)
    rank = RankEnvironment.read()
    distributed.start(rank)
    layout = Layout.from_config(config, rank.world_size)
    distributed.build_groups(config, layout)
    contestants = [Contestant("base", config, layout)]
    for name, changes in variants.items():
        start = vanilla(config) if name == "vanilla" else config
        contestants.append(Contestant(name, with_overrides(start, changes), layout))
    for step in range(1, config.training.train_iters + 1):
        for index in range(len(contestants)):
            contestants[(index + step) % len(contestants)].step()
        if rank.rank == 0 and step % 20 == 0:
            losses = ", ".join(f"{c.name} {c.recent_loss():.4f}" for c in contestants)
            print(f"step {step}, mean of 10: {losses}", flush=True)
    results = [(c, c.validation()) for c in contestants]
    if rank.rank == 0:
        for contestant, valid_loss in results:
            ratios = [v / b for v, b in zip(contestant.times, contestants[0].times, strict=True)]
            print(
                f"{contestant.name}: loss {contestant.recent_loss():.4f} (mean of 10), validation "
                f"{valid_loss:.4f}, FFN share {statistics.mean(contestant.ffn_fractions[-10:]):.3f}"
                f", step time against base {statistics.median(ratios):.3f} (median of pairs)"
            )
    distributed.stop()


if __name__ == "__main__":
    main()
