"""Token tags in training: support in the layout, and setup."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.statistics import RoutingStatistics
from moepp_megatron.moe.token_tags import TokenTags


def layers_know_tokens(config: Config) -> bool:
    """True if the layers receive token tags.

    They do not with the combined schedule or a router in a CUDA graph.
    """
    return not (
        config.parallel.overlap_moe_expert_parallel_comm
        or "moe_router" in config.training.cuda_graphs
        or config.moe.is_vanilla
    )


def tag_tokens(
    chunks: Iterable[torch.nn.Module], groups: Tensor | None = None
) -> list[RoutingStatistics]:
    """Let the layers of model chunks know their tokens; the layers' statistics.

    `groups` are [vocabulary] int64 groups of token ids, on the device; None leaves them as they
    are.
    """
    found: list[RoutingStatistics] = []
    for chunk in chunks:
        assert isinstance(chunk, MoEPPGPTModel), "layers of other models know nothing"
        chunk.token_tags = chunk.token_tags or TokenTags()
        if groups is not None:
            chunk.token_tags.groups = groups
        found += moe_statistics(chunk).values()
    return found
