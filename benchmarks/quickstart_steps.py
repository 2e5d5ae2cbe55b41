"""Training steps of the quickstart model on random tokens, of several kinds in turns."""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist


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
    def build(
        cls, folder: Path, *settings: str, dataset: Callable[[Any], Any] | None = None
    ) -> QuickstartSteps:
        """Builds the model, and the groups where there are none; every rank calls.

        Args:
            folder: `run.dir`.
            *settings: Further `section.key=value`.
            dataset: Makes the data from the configuration; random tokens by default.
        """
        from megatron.core import parallel_state

        from moepp_megatron.config import Layout, load_config
        from moepp_megatron.runtime.distributed import build_groups
        from moepp_megatron.training.batches import rank_batches
        from moepp_megatron.training.setup import build_training_model
        from moepp_megatron.workbench.bench.step import RandomTokens

        quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
        config = load_config(quickstart, [f"run.dir={folder}", *settings])
        layout = Layout.from_config(config, dist.get_world_size())
        if not parallel_state.model_parallel_is_initialized():
            build_groups(config, layout)
        model = build_training_model(config)
        model.set_training(True)
        data = (dataset or RandomTokens)(config)
        batches = rank_batches(data, 0, config, len(model.chunks))
        return cls(config, layout, model, batches)

    def take(self, *extra: Any) -> None:
        """One training step; further arguments are those of `training_step`."""
        from moepp_megatron.training.step import training_step

        training_step(self.model, self.batches, self.config, self.layout, *extra)


@dataclass(frozen=True)
class Kind:
    """One kind of step that is timed.

    Attributes:
        step: The step.
        before: What has to be done before it.
        after: What has to be done after it.
    """

    step: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Times:
    """Seconds of one kind of step, one entry a round.

    Attributes:
        wall: From all ranks' start to all ranks' end.
        processor: This rank's processor time, which other work on the machine disturbs less.
        before: Wall time of what came before the step.
        after: Of what came after it.
    """

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


def in_turns(kinds: Mapping[str, Kind], rounds: int) -> dict[str, Times]:
    """Takes a step of each kind in every round; every rank calls.

    What a step leaves behind is the next one's: each kind follows each other kind equally often.
    The first round warms up and is not counted.
    """
    times = {name: Times() for name in kinds}
    orders = itertools.cycle(itertools.permutations(kinds))
    for index, order in enumerate(itertools.islice(orders, rounds + 1)):
        for name in order:
            found = _timed(kinds[name])
            if index > 0:
                for values, value in zip(_lists(times[name]), found, strict=True):
                    values.append(value)
    return times


def _timed(kind: Kind) -> tuple[float, float, float, float]:
    """As the fields of `Times`."""
    began = time.perf_counter()
    kind.before()
    dist.barrier()
    ready, processor = time.perf_counter(), time.process_time()
    kind.step()
    processor = time.process_time() - processor
    dist.barrier()
    done = time.perf_counter()
    kind.after()
    return done - ready, processor, ready - began, time.perf_counter() - done


def _lists(times: Times) -> tuple[list[float], ...]:
    return times.wall, times.processor, times.before, times.after


def on_ranks(
    description: str | None, default_rounds: int, measure: Callable[[int, Path], list[str]]
) -> None:
    """A benchmark under torchrun: reads `--rounds`, measures on every rank, rank 0 prints.

    Args:
        description: Of the command.
        default_rounds: Rounds unless told.
        measure: Takes rounds and an empty folder; returns lines to print.
    """
    from moepp_megatron.runtime.distributed import initialized
    from moepp_megatron.runtime.quiet import quiet
    from moepp_megatron.runtime.rank import RankEnvironment

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=default_rounds)
    rounds = parser.parse_args().rounds
    quiet()
    logging.disable()
    rank = RankEnvironment.read()
    with initialized(rank), tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders, 0)
        lines = measure(rounds, Path(folders[0]))
        # Rank 0 removes the folder.
        dist.barrier()
    if rank.rank == 0:
        print("\n".join(lines))


def quartiles(values: Iterable[float], unit: float = 1e3) -> str:
    """Median (quartiles)."""
    low, middle, high = (unit * one for one in statistics.quantiles(values, n=4))
    digits = 0 if unit == 1e3 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(kind: list[float], plain: list[float]) -> list[float]:
    """Time of one kind over that of another in the same round."""
    return [one / other for one, other in zip(kind, plain, strict=True)]


def table(times: Mapping[str, Times], plain: str) -> str:
    """Milliseconds of each kind and its ratios to `plain`, by either clock, as Markdown."""
    others = [name for name in times if name != plain]
    heads = ["clock", *times, *(f"{name} / {plain}" for name in others)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for clock in ("wall", "processor"):
        of = {name: getattr(found, clock) for name, found in times.items()}
        cells = [quartiles(values) for values in of.values()]
        cells += [quartiles(ratios(of[name], of[plain]), 1) for name in others]
        lines.append("| " + " | ".join([clock, *cells]) + " |")
    return "\n".join(lines)
