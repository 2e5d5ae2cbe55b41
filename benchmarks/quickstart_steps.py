"""Training steps of the quickstart model on random tokens, of several kinds in turns."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class RandomTokens:
    """Sequences of random tokens.

    Args:
        length: Of a sequence.
        vocab_size: Ids are below this.
    """

    def __init__(self, length: int, vocab_size: int) -> None:
        self._length, self._vocab_size = length, vocab_size

    def __len__(self) -> int:
        """More than any run reads."""
        return 1_000_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Depends on the index alone."""
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self._vocab_size, (self._length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self._length),
            "position_ids": torch.arange(self._length),
        }


@dataclass(frozen=True)
class QuickstartSteps:
    """What a training step of the quickstart model needs.

    Attributes:
        config: Its configuration.
        layout: The rank grid.
        model: The wrapped model.
        batches: The rank's batches.
    """

    config: Any
    layout: Any
    model: Any
    batches: Any

    @classmethod
    def build(cls, folder: Path, *settings: str) -> QuickstartSteps:
        """Builds groups and model; every rank calls, once.

        Args:
            folder: `run.dir`.
            *settings: Further `section.key=value`.
        """
        from moepp_megatron.config import Layout, load_config
        from moepp_megatron.runtime.distributed import build_groups
        from moepp_megatron.training.batches import rank_batches
        from moepp_megatron.training.setup import build_training_model

        quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
        config = load_config(quickstart, [f"run.dir={folder}", *settings])
        layout = Layout.from_config(config, dist.get_world_size())
        build_groups(config, layout)
        model = build_training_model(config)
        model.set_training(True)
        data = RandomTokens(config.model.seq_length, config.model.vocab_size)
        return cls(config, layout, model, rank_batches(data, 0, config, len(model.chunks)))

    def take(self, *extra: Any) -> None:
        """One training step; further arguments are those of `training_step`."""
        from moepp_megatron.training.step import training_step

        training_step(self.model, self.batches, self.config, self.layout, *extra)


def in_turns(kinds: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, one a round; every rank calls.

    What a step leaves behind is the next one's: each kind follows each other kind equally often.
    The first round warms up and is not among them.
    """
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for order in itertools.islice(itertools.cycle(itertools.permutations(kinds)), rounds + 1):
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            kinds[name]()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in times.items()}


def quartiles(values: Iterable[float], unit: float = 1e3) -> str:
    """Median (quartiles)."""
    low, middle, high = (unit * one for one in statistics.quantiles(values, n=4))
    digits = 0 if unit == 1e3 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(times: Mapping[str, list[float]], name: str, to: str) -> list[float]:
    """Time of one kind over that of another in the same round."""
    return [other / plain for plain, other in zip(times[to], times[name], strict=True)]
