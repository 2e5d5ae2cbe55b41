"""The sizes that deep_ep, the package of the flex dispatcher, requires.

A wrong size ends in an assertion of its C++ or just-in-time code, in the first step on a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator

from moepp_megatron.config.problem import Problem
from moepp_megatron.config.rules.divisibility import must_divide
from moepp_megatron.config.schema import Config

# Tokens move in pieces of 16 bytes, 8 bf16 values.
HIDDEN_ALIGNMENT = 8
# HybridEP gathers 4 bytes per token, in pieces of 16 bytes.
HYBRIDEP_TOKEN_ALIGNMENT = 4


def _flex_dispatcher_needs_expert_ranks(config: Config) -> Iterator[Problem]:
    """DeepEP asserts that there is more than one rank."""
    parallel = config.parallel
    ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_size
    if config.moe.dispatcher == "flex" and ranks == 1:
        yield Problem(
            "moe.dispatcher",
            "flex",
            "must have more than one rank in parallel.expert_model_parallel_size (1) * "
            "parallel.expert_tensor_parallel_size (1)",
            "use alltoall, or set parallel.expert_model_parallel_size to 2 or more",
        )


def _flex_sizes_are_aligned(config: Config) -> Iterator[Problem]:
    """Hidden vectors are multiples of 16 bytes; DeepEP's kernels use SMs in pairs."""
    moe = config.moe
    if moe.dispatcher != "flex":
        return
    yield from must_divide(
        "model.hidden_size",
        config.model.hidden_size,
        HIDDEN_ALIGNMENT,
        f"{HIDDEN_ALIGNMENT} for moe.dispatcher flex",
    )
    if moe.flex_num_sms is not None and moe.flex_backend != "hybridep":
        yield from must_divide(
            "moe.flex_num_sms", moe.flex_num_sms, 2, f"2 for moe.flex_backend {moe.flex_backend}"
        )


def _hybridep_tokens_are_aligned(config: Config) -> Iterator[Problem]:
    """HybridEP aborts if a rank's tokens of a micro-batch are not a multiple of 4."""
    if config.moe.dispatcher != "flex" or config.moe.flex_backend != "hybridep":
        return
    tokens = config.tokens_per_rank
    if tokens % HYBRIDEP_TOKEN_ALIGNMENT:
        yield Problem(
            "training.micro_batch_size",
            config.training.micro_batch_size,
            f"must give each rank a number of tokens ({tokens}) divisible by "
            f"{HYBRIDEP_TOKEN_ALIGNMENT} with moe.flex_backend hybridep",
            f"use {HYBRIDEP_TOKEN_ALIGNMENT}, or moe.flex_backend deepep",
        )


RULES = (
    _flex_dispatcher_needs_expert_ranks,
    _flex_sizes_are_aligned,
    _hybridep_tokens_are_aligned,
)
