"""The rows of FP8 experts: filled up on the experts' rank, and nowhere else."""

import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context
from transformer_engine.pytorch.record import CALLS

from tests.te_stand_in import experts
from tests.te_stand_in.experts import FFN, HIDDEN, TOKENS, layer_of, routing_to
from tests.te_stand_in.models import RECIPES, calls_of, config_of

DISPATCHERS = ["alltoall", "alltoall_dedup", "allgather"]
FC1, FC2 = "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"


def run(layer, routing, hidden):
    """As `experts.run`, with nothing recorded before."""
    CALLS.clear()
    return experts.run(layer, routing, hidden)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("counts", "padded"),
    [
        ([5, 0, 17, 16], (16, 0, 32, 16)),
        ([16, 16, 16, 16], (16, 16, 16, 16)),
        ([0, 0, 0, 1], (0, 0, 0, 16)),
    ],
    ids=str,
)
def test_experts_alone_fill_up_their_rows(recipe, dispatcher, counts, padded):
    layer = layer_of(recipe, dispatcher)
    seen = run(layer, routing_to(counts), torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16))
    # What the dispatcher carries and counts are the selections that the router made ...
    assert (seen.rows, seen.by_expert) == (sum(counts), counts)
    # ... and both GEMMs see each expert's rows filled up to a multiple of 16.
    for module in (FC1, FC2):
        (call,) = calls_of(module)
        assert (call.rows, call.recipe) == (padded, RECIPES[recipe])


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_micro_batch_without_ffn_tokens(recipe, dispatcher):
    """Collectives and GEMMs still run, or ranks with tokens would wait, and gradients flow."""
    layer = layer_of(recipe, dispatcher)
    assert layer.config.moe_permute_fusion
    routing = routing_to([0, 0, 0, 0])
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    seen = run(layer, routing, hidden)
    assert (seen.rows, seen.by_expert) == (0, [0] * FFN)
    assert [calls_of(module)[0].rows for module in (FC1, FC2)] == [(0,) * FFN] * 2
    alone = layer.zero_computation(hidden.view(TOKENS, HIDDEN), routing.gates)
    assert torch.equal(seen.output.view(TOKENS, HIDDEN), alone)
    seen.output.float().sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert layer.experts.linear_fc1.weight0.grad.abs().sum() == 0
    # The next micro-batch has tokens again, and the fused kernels.
    assert run(layer, routing_to([3, 3, 3, 3]), hidden).rows == 12
    assert layer.token_dispatcher.config.moe_permute_fusion


@pytest.mark.parametrize("recipe", RECIPES)
def test_filled_up_rows_change_nothing(recipe):
    """Zero rows do not move the scale of a tensor, so that a larger multiple gives the same."""
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    layer, routing = layer_of(recipe), routing_to([5, 0, 17, 16])
    outputs = []
    for multiple in (16, 64):
        layer.experts.quantization_padding.align_size = multiple
        layer.experts.quantization_unpadding.align_size = multiple
        outputs.append(run(layer, routing, hidden).output)
    assert calls_of(FC1)[0].rows == (64, 0, 64, 64)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("recipe", RECIPES)
def test_router_and_zero_computation_experts_stay_in_high_precision(recipe):
    layer = layer_of(recipe)
    hidden = torch.randn(TOKENS, 1, HIDDEN, dtype=torch.bfloat16)
    previous = torch.randn(TOKENS, 1, FFN + 4)
    outside = layer.router(hidden, previous)
    alone = layer.zero_computation(hidden.view(TOKENS, HIDDEN), outside.gates)
    with get_fp8_context(layer.config):
        inside = layer.router(hidden, previous)
        within = layer.zero_computation(hidden.view(TOKENS, HIDDEN), outside.gates)
    assert CALLS == []
    assert inside.logits.dtype is torch.float32
    assert inside.gates.dtype is torch.float32
    assert torch.equal(inside.logits, outside.logits)
    assert torch.equal(within, alone)


def test_padding_by_the_router_is_refused():
    from moepp_megatron.model.megatron_config import moepp_config, transformer_config
    from moepp_megatron.moe.spec import get_moepp_layer_spec

    config = config_of("delayed")
    megatron, moepp = transformer_config(config), moepp_config(config)
    megatron.moe_router_padding_for_quantization = True
    with pytest.raises(ValueError, match="not supported by the MoE\\+\\+ layer, because padding"):
        get_moepp_layer_spec(megatron, moepp, use_transformer_engine=True)
