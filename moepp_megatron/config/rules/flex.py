"""The sizes that deep_ep, the package of the flex dispatcher, requires.

A wrong size ends in an assertion of its C++ or just-in-time code, in the first step on a cluster.
"""

from __future__ import annotations

from moepp_megatron.config.rows import Rule, group, refuse
from moepp_megatron.config.rules.divisibility import divisible

# Tokens move in pieces of 16 bytes, 8 bf16 values.
HIDDEN_ALIGNMENT = 8
# HybridEP gathers 4 bytes per token, in pieces of 16 bytes.
_TOKEN_ALIGNMENT = 4

RULES: tuple[Rule, ...] = (
    group(
        lambda c: c.moe.dispatcher == "flex",
        refuse(
            "moe.dispatcher",
            lambda c: c.parallel.expert_model_parallel_size * c.parallel.expert_tensor_size == 1,
            "must have more than one rank in parallel.expert_model_parallel_size (1) * "
            "parallel.expert_tensor_parallel_size (1)",
            "use alltoall, or set parallel.expert_model_parallel_size to 2 or more",
        ),
        divisible(
            "model.hidden_size",
            lambda c: HIDDEN_ALIGNMENT,
            f"{HIDDEN_ALIGNMENT} for moe.dispatcher flex",
        ),
        # DeepEP's kernels use multiprocessors in pairs.
        group(
            lambda c: c.moe.flex_num_sms is not None and c.moe.flex_backend != "hybridep",
            divisible("moe.flex_num_sms", lambda c: 2, "2 for moe.flex_backend {moe.flex_backend}"),
        ),
        refuse(
            "training.micro_batch_size",
            lambda c: c.moe.flex_backend == "hybridep" and c.tokens_per_rank % _TOKEN_ALIGNMENT,
            "must give each rank a number of tokens ({tokens_per_rank}) divisible by "
            f"{_TOKEN_ALIGNMENT} with moe.flex_backend hybridep",
            f"use {_TOKEN_ALIGNMENT}, or moe.flex_backend deepep",
        ),
    ),
)
