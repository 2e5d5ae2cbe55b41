"""Made-up texts, and a training on them watched for shifts of the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from moepp_megatron.observe.shift.reading import ShiftReading
from tests.parallel.training_runs import begin_training, settings, watching

LENGTH, BATCH, TOKENS = 32, 64, 128

WATCHED: dict[str, Any] = settings(
    model={
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "seq_length": LENGTH,
        "vocab_size": TOKENS,
        "init_method_std": 0.05,
    },
    moe={"num_ffn_experts": 8, "balance_coeff": 0.05},
    optimizer={"lr": 4.0e-3, "weight_decay": 0.1, "warmup_iters": 5},
    training={"train_iters": 1000, "global_batch_size": BATCH, "micro_batch_size": BATCH},
    routing_guard={"shift": {"window": 4, "warmup": 10}},
)


class Language:
    """Sequences in which each token has four likely successors, by a table of this language.

    Args:
        seed: Of the table.
        frequency: Exponent by which later token ids are rarer.
    """

    def __init__(self, seed: int, frequency: float = 1.0) -> None:
        chance = np.random.default_rng(seed)
        weights = 1.0 / np.arange(1, TOKENS + 1) ** frequency
        order = chance.permutation(TOKENS)
        self._shares = (weights / weights.sum())[order]
        self._next = chance.choice(TOKENS, size=(TOKENS, 4), p=self._shares)

    def sequence(self, seed: int) -> np.ndarray:
        """[LENGTH + 1] int64."""
        chance = np.random.default_rng(seed)
        tokens = [int(chance.choice(TOKENS, p=self._shares))]
        for place in chance.integers(4, size=LENGTH):
            tokens.append(int(self._next[tokens[-1], place]))
        return np.array(tokens)


class Languages:
    """So many samples of each language, in order."""

    def __init__(self, counts: list[tuple[int, int]]) -> None:
        self._languages = {seed: Language(seed) for seed, _ in counts}
        self._seeds = [seed for seed, count in counts for _ in range(count)]

    def __len__(self) -> int:
        return len(self._seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        tokens = torch.from_numpy(self._languages[self._seeds[index]].sequence(index))
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(LENGTH),
            "position_ids": torch.arange(LENGTH),
        }


def watch(counts: list[tuple[int, int]]) -> tuple[list[ShiftReading | None], Any]:
    """Train on so many steps of each language.

    Returns:
        What is known after each step, and what the first alarm is about.
    """
    from moepp_megatron.training.parts.batch_losses import BatchLosses
    from moepp_megatron.training.routing_shift import RoutingShift
    from moepp_megatron.training.step import training_step

    dataset = Languages([(seed, steps * BATCH) for seed, steps in counts])
    config, layout, model, routing, batches = begin(WATCHED, dataset)
    shift, losses = RoutingShift(config, model, routing, dataset), BatchLosses()
    readings: list[ShiftReading | None] = []
    story = None
    for _ in range(sum(steps for _, steps in counts)):
        routing.reset()
        losses.begin_batch()

        shift.counts.begin()

        def watcher(chunk: Any, batch: Any, token_losses: Any) -> None:
            losses.add(batch, token_losses)
            shift.counts.add(batch)

        result = training_step(model, batches, config, layout, watching(watcher))
        reading = shift.end_step(losses.sum_up(result))
        readings.append(reading)
        if story is None and reading is not None and max(reading.routing, reading.loss) > 1.0:
            story = shift.explain()
    return readings, story


def begin(raw: dict[str, Any], dataset: Any) -> tuple[Any, Any, Any, Any, Any]:
    """Configuration, layout, model in training, collector and batches on this rank."""
    from moepp_megatron.training.batches import rank_batches
    from moepp_megatron.training.parts.routing_counts import RoutingCounts

    config, layout, model = begin_training(raw)
    routing = RoutingCounts(model, config, layout)
    return config, layout, model, routing, rank_batches(dataset, 0, config, len(model.chunks))
