"""What expert-parallel ranks do for tests with the stand-in; ranks import these by name."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformer_engine.common.recipe import Float8BlockScaling
from transformer_engine.pytorch import autocast
from transformer_engine.pytorch.record import CALLS

from tests.parallel import dispatch_runs

TOKENS = 48


def uneven(rank: int, num_tokens: int, num_ffn: int, num_experts: int, topk: int) -> torch.Tensor:
    """Random selections, others on each rank."""
    return dispatch_runs.routing_map(rank, num_tokens, num_ffn, num_experts, topk)


def starved(rank: int, num_tokens: int, num_ffn: int, num_experts: int, topk: int) -> torch.Tensor:
    """Rank 0 sends to its own experts alone; rank 1 neither sends a token nor gets one."""
    selected = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    first = 0 if rank == 0 else num_ffn
    selected[:, first : first + topk] = True
    return selected


def dispatch(raw: dict[str, Any], draw: Any, in_fp8: bool) -> dict[str, Any]:
    """`dispatch_runs.sent_bytes` of a layer with Transformer Engine's experts, in FP8 or not.

    Returns:
        As that, and `rows`: the rows of each GEMM of the experts' first and second layer.
    """
    _count_stand_in()
    CALLS.clear()
    with autocast(recipe=Float8BlockScaling()) if in_fp8 else nullcontext():
        result = dispatch_runs.sent_bytes(raw, draw, TOKENS)
    return result | {"rows": [call.rows for call in CALLS]}


def _count_stand_in() -> None:
    """The pool that runs this is for these tests alone, so nothing has to be put back."""
    from moepp_megatron.model import build, megatron_config

    build.have_transformer_engine = lambda: True
    megatron_config.have_transformer_engine = lambda: True


def resume_with_bf16_moments(folder: Path, is_writing: bool) -> dict[str, Any]:
    """Train, save and read on the ranks that write; read alone on those that do not.

    Returns:
        `is_same`: another step is the same with the model that was read; `weights`: its checksum
        then; `moments`: sum of this rank's first moments.
    """
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from moepp_megatron.config import Layout
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.checkpoint.data_only import load_data
    from moepp_megatron.training.checkpoint.state import apply_state, saved_state, wanted_state
    from moepp_megatron.training.setup import build_training_model
    from tests.te_stand_in.models import config_of
    from tests.te_stand_in.test_checkpoint import BF16_MOMENTS, step

    _count_stand_in()
    config = config_of(None, optimizer=BF16_MOMENTS, training={"global_batch_size": 4})
    build_groups(config, Layout.from_config(config, dist.get_world_size()))
    second = build_training_model(config)
    if is_writing:
        first = build_training_model(config)
        for _ in range(2):
            step(first)
        dist_checkpointing.save(saved_state(first), str(folder))
    apply_state(second, load_data(wanted_state(second), folder))
    inner = [part.optimizer for part in second.optimizer.chained_optimizers]
    moments = [state["exp_avg"] for each in inner for state in each.state.values()]
    assert {moment.dtype for moment in moments} == {torch.bfloat16}
    found = {
        "weights": sum(float(p.double().sum()) for p in second.models[0].parameters()),
        "moments": sum(moment.float().abs().double().sum().item() for moment in moments),
    }
    if is_writing:
        found["is_same"] = all(torch.equal(step(second), step(first)) for _ in range(2))
    return found


def train_in_nodes(raw: dict[str, Any], steps: int) -> tuple[Any, int]:
    """`training_runs.train`, and how often gradients of weights were computed on their own."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from tests.parallel.training_runs import train

    _count_stand_in()
    delayed = []
    original = TransformerEngineBaseModule.backward_dw

    def counting(module: TransformerEngineBaseModule) -> None:
        delayed.append(type(module).__name__)
        original(module)

    TransformerEngineBaseModule.backward_dw = counting
    try:
        return train(raw, steps), len(delayed)
    finally:
        TransformerEngineBaseModule.backward_dw = original
