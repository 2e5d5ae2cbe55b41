"""Rules of attention that stays within documents (`data.reset_attention_mask`)."""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.schema import Config


def _masks_reach_attention(config: Config) -> Iterator[Problem]:
    """A graph is captured once, and every micro-batch has other documents and other padding."""
    graphs = config.training.cuda_graphs
    if config.data.reset_attention_mask and graphs:
        yield Problem(
            "data.reset_attention_mask",
            True,
            f"must be false with training.cuda_graphs ({', '.join(graphs)}): a graph's inputs are "
            "of fixed sizes, and neither documents nor padding are among them",
            "set training.cuda_graphs to [], or data.reset_attention_mask to false",
        )


RULES = (_masks_reach_attention,)
