"""The lane of router logits: bits across a stage boundary, and back for the gradients."""

import pytest
import torch

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import lane_columns, no_logits, pack, pipeline_config, unpack
from tests.unit.moe.builders import HIDDEN, build_transformer_layer, megatron_config, randomize

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# One token: a slice of it counts as contiguous, so its storage offset stays.
SHAPES = pytest.mark.parametrize("shape", [(5, 3), (1, 1), (7, 1)], ids=str)


def random_bits(*shape, dtype=torch.float32):
    """Any bit pattern of `dtype`: infinities, denormals and NaNs with payload among them."""
    if dtype is torch.float32:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32).view(dtype)
    return torch.randint(-(2**15), 2**15 - 1, shape, dtype=torch.int16).view(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def test_random_bits_hold_nans():
    assert random_bits(5, 3, 400).isnan().any()
    assert random_bits(5, 3, 400, dtype=torch.bfloat16).isnan().any()


@DTYPES
@SHAPES
@pytest.mark.parametrize("num_experts", [1, 7, 400])
def test_round_trip_keeps_every_bit(dtype, shape, num_experts):
    hidden = random_bits(*shape, HIDDEN, dtype=dtype)
    logits = random_bits(*shape, num_experts)
    packed = pack(hidden, logits)
    assert packed.dtype is dtype
    back, logits_back = unpack(packed, HIDDEN)
    assert logits_back.dtype is torch.float32
    assert torch.equal(bits(back), bits(hidden))
    assert torch.equal(bits(logits_back), bits(logits))


@DTYPES
@SHAPES
def test_gradients_cross_with_every_bit(dtype, shape):
    hidden = torch.randn(*shape, HIDDEN, dtype=dtype, requires_grad=True)
    logits = torch.randn(*shape, 7, requires_grad=True)
    back, logits_back = unpack(pack(hidden, logits), HIDDEN)
    hidden_grad, logits_grad = random_bits(*shape, HIDDEN, dtype=dtype), random_bits(*shape, 7)
    torch.autograd.backward((back, logits_back), (hidden_grad, logits_grad))
    assert torch.equal(bits(hidden.grad), bits(hidden_grad))
    assert torch.equal(bits(logits.grad), bits(logits_grad))


@DTYPES
def test_a_side_without_gradient_gets_zeros(dtype):
    hidden = torch.randn(5, 3, HIDDEN, dtype=dtype, requires_grad=True)
    logits = torch.randn(5, 3, 7, requires_grad=True)
    unpack(pack(hidden, logits), HIDDEN)[1].sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(logits.grad, torch.ones_like(logits))


@pytest.mark.parametrize(("dtype", "per_logit"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_lane_columns(dtype, per_logit):
    moepp = MoEPPConfig(4)
    columns = lane_columns(moepp, dtype)
    assert columns == 8 * per_logit
    packed = pack(torch.zeros(2, 2, HIDDEN, dtype=dtype), torch.zeros(2, 2, 8))
    assert packed.shape[-1] == HIDDEN + columns
    assert lane_columns(MoEPPConfig(4, gating_residual=False), dtype) == 0


def test_pipeline_config_widens_only_the_schedules_view():
    moepp = MoEPPConfig(4)
    single = megatron_config(moepp)
    assert pipeline_config(single, moepp) is single
    staged = megatron_config(
        moepp,
        num_layers=4,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    wide = pipeline_config(staged, moepp)
    assert wide.hidden_size == HIDDEN + 16
    assert staged.hidden_size == HIDDEN


@DTYPES
def test_no_logits(dtype):
    lane = no_logits(torch.randn(5, 3, HIDDEN, dtype=dtype), 7)
    assert lane.dtype is torch.float32
    assert torch.equal(lane, torch.zeros(5, 3, 7))


def test_layer_that_ends_a_stage_glues_the_lane_on():
    moepp = MoEPPConfig(4)
    layer = build_transformer_layer(moepp)
    randomize(layer)
    hidden, lane = torch.randn(6, 2, HIDDEN), torch.randn(6, 2, 8)
    output, logits = layer(hidden, context=lane)
    layer.lane_width = moepp.num_experts
    packed, _ = layer(hidden, context=lane)
    assert packed.shape == (6, 2, HIDDEN + 8)
    unpacked, crossed = unpack(packed, HIDDEN)
    assert torch.equal(unpacked, output)
    assert torch.equal(crossed, logits)
