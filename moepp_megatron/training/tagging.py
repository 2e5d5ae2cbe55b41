"""Whether layers know which tokens they see, and from what."""

from __future__ import annotations

import torch

from moepp_megatron.config import Config
from moepp_megatron.model.gpt import MoEPPGPTModel
from moepp_megatron.moe.token_tags import TokenTags


def layers_know_tokens(config: Config) -> bool:
    """Whether the layers know which tokens they see.

    They do not with the combined schedule or a router in a CUDA graph.
    """
    return not (
        config.parallel.overlap_moe_expert_parallel_comm
        or "moe_router" in config.training.cuda_graphs
        or config.moe.is_vanilla
    )


def tags_of(chunk: torch.nn.Module, config: Config) -> TokenTags:
    """The tags of a model chunk, made if it has none yet."""
    assert isinstance(chunk, MoEPPGPTModel), "layers of other models know nothing"
    if chunk.token_tags is None:
        chunk.token_tags = TokenTags()
    return chunk.token_tags
