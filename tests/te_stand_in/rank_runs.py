"""Functions of expert-parallel ranks for tests with the stand-in; ranks import these by name."""

from contextlib import nullcontext
from unittest import mock

import torch
from transformer_engine.common.recipe import Float8BlockScaling
from transformer_engine.pytorch import autocast
from transformer_engine.pytorch.record import CALLS

from tests.parallel import dispatch_runs

TOKENS = 48


def uneven(rank, num_tokens, num_ffn, num_experts, topk):
    """Random selections, others on each rank."""
    return dispatch_runs.routing_map(rank, num_tokens, num_ffn, num_experts, topk)


def starved(rank, num_tokens, num_ffn, num_experts, topk):
    """Rank 0 sends only to its own experts; rank 1 neither sends a token nor gets one."""
    selected = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    first = 0 if rank == 0 else num_ffn
    selected[:, first : first + topk] = True
    return selected


def dispatch(raw, draw, in_fp8):
    """`dispatch_runs.sent_bytes` of a layer with Transformer Engine's experts, in FP8 or not.

    Returns:
        As that, and `rows`: the rows of each GEMM of the experts' first and second layer.
    """
    _count_stand_in()
    CALLS.clear()
    with autocast(recipe=Float8BlockScaling()) if in_fp8 else nullcontext():
        result = dispatch_runs.sent_bytes(raw, draw, TOKENS)
    return result | {"rows": [call.rows for call in CALLS]}


def _count_stand_in():
    """The pool that runs this is only for these tests, so nothing has to be put back."""
    from moepp_megatron.model import build, megatron_config

    build.have_transformer_engine = lambda: True
    megatron_config.have_transformer_engine = lambda: True


def train_in_nodes(raw, steps):
    """`training_runs.train`, and how often gradients of weights were computed on their own."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from tests.parallel.training_runs import train

    _count_stand_in()
    computed = TransformerEngineBaseModule.backward_dw
    with mock.patch.object(
        TransformerEngineBaseModule, "backward_dw", autospec=True, side_effect=computed
    ) as calls:
        return train(raw, steps), calls.call_count
