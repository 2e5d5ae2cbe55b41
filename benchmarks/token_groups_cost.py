"""What counting by data source and class of tokens costs a step: steps in turn.

Run under torchrun, from the repository's root:

    torchrun --standalone --nproc-per-node 2 -m benchmarks.token_groups_cost

A round is a step whose tokens are not counted, one whose tokens are counted in their classes and in
eight data sources, with the numbers of the record, and one without again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quickstart_steps import Kind, QuickstartSteps, in_turns, on_ranks, table

SOURCES = tuple(f"source {number}" for number in range(8))


def sourced_tokens(config: Any) -> Any:
    """Random tokens, each sample of one data source."""
    import torch

    from moepp_megatron.workbench.bench.step import RandomTokens

    class SourcedTokens(RandomTokens):
        source_names = SOURCES

        def __getitem__(self, index: int) -> dict[str, Any]:
            sample = super().__getitem__(index)
            source = index % len(SOURCES)
            return sample | {"sources": torch.full_like(sample["tokens"], source).int()}

    return SourcedTokens(config)


def measure(rounds: int, folder: Path) -> list[str]:
    """Plain steps, counted ones, and plain ones again."""
    from moepp_megatron.data.token_groups import BANDS, token_groups
    from moepp_megatron.training.collect import RoutingCollector
    from moepp_megatron.training.data_sources import SourceCollector
    from moepp_megatron.training.token_groups import GroupCollector

    steps = QuickstartSteps.build(folder, dataset=sourced_tokens)
    routing = RoutingCollector(steps.model, steps.config, steps.layout)
    bands = np.arange(steps.config.model.vocab_size) % len(BANDS)
    classes = np.arange(len(bands)) % 6
    numbers = routing.layer_numbers
    groups = GroupCollector(
        steps.config, steps.model, numbers, token_groups(bands.astype(np.int64), classes)
    )
    sources = SourceCollector(steps.config, steps.model, sourced_tokens(steps.config))
    tags = [chunk.token_tags for chunk in steps.model.models]

    def step(is_counted: bool) -> None:
        routing.reset()
        for chunk, each in zip(steps.model.models, tags, strict=True):
            chunk.token_tags = each if is_counted else None
        sources.begin_step()
        groups.begin_step()
        watch = lambda chunk, batch, losses: sources.add_losses(batch, losses)  # noqa: E731
        steps.take(None, watch if is_counted else None)
        routing.collect()
        if is_counted:
            assert len(sources.collect()["source_ffn_share"]) == len(SOURCES), "all are counted"
            assert len(groups.collect()["class_ffn_per_token"]) == len(groups.groups.names)

    kinds = {
        "plain": Kind(lambda: step(False)),
        "counted": Kind(lambda: step(True)),
        "again": Kind(lambda: step(False)),
    }
    return [table(in_turns(kinds, rounds), "plain")]


if __name__ == "__main__":
    on_ranks(__doc__, default_rounds=30, measure=measure)
