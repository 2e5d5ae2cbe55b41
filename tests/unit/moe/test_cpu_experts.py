"""The experts' loop on a CPU against megatron-core's `SequentialMLP` of the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.cpu_experts import CPUExperts, suits
from moepp_megatron.moe.spec import get_moepp_layer_spec
from tests.unit.moe.builders import HIDDEN, megatron_config

MOEPP = MoEPPConfig(num_ffn_experts=4)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU megatron-core's own experts are used"
)


def both(dtype: torch.dtype) -> tuple[SequentialMLP, CPUExperts]:
    """Theirs and ours, with equal weights."""
    config = megatron_config(MOEPP, params_dtype=dtype, bf16=dtype is torch.bfloat16)
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    builder = spec.submodules.mlp.keywords["submodules"].experts
    assert builder.func is CPUExperts
    groups = get_default_pg_collection()
    ours = builder(4, config, pg_collection=groups)
    theirs = partial(SequentialMLP, **builder.keywords)(4, config, pg_collection=groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator) * 0.3)
            other.copy_(mine)
    return theirs, ours


def run(experts: SequentialMLP, rows: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of input, gates and parameters."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(sum(rows), HIDDEN, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(sum(rows), generator=generator).requires_grad_()
    output, bias = experts(tokens, torch.tensor(rows), gates)
    assert bias is None
    assert output.dtype is dtype
    output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    grads = [tokens.grad, gates.grad, *(p.grad for p in experts.parameters())]
    for index, grad in enumerate(grads):
        # An expert without tokens: its gradient is none or zeros.
        grads[index] = torch.zeros(()) if grad is None else grad
    return [output.detach(), *grads]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "rows", [[5, 1, 0, 9], [0, 0, 7, 0], [0, 0, 0, 0], [300, 2, 40, 170]], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_equals_sequential_mlp(rows: list[int], dtype: torch.dtype, tolerance: float) -> None:
    theirs, ours = both(dtype)
    for expected, actual in zip(run(theirs, rows, dtype), run(ours, rows, dtype), strict=True):
        expected, actual = expected.float(), actual.float()
        if actual.shape != expected.shape:
            assert not expected.any()
            assert not actual.any()
            continue
        # Relative to the tensor: one sum of many terms cancels where another does not.
        scale = expected.abs().max() if expected.numel() else torch.ones(())
        error = (actual - expected).abs().max() if expected.numel() else torch.zeros(())
        assert error <= tolerance * scale + 1e-30


def test_frozen_weights_get_no_gradient() -> None:
    _, ours = both(torch.float32)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    tokens = torch.randn(4, HIDDEN, requires_grad=True)
    output, _ = ours(tokens, torch.tensor([1, 1, 1, 1]), torch.ones(4))
    output.sum().backward()
    assert tokens.grad is not None
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize(
    "changes",
    [{"gated_linear_unit": False}, {"activation_func": torch.relu}, {"add_bias_linear": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_experts_stay_with_megatron_core(changes: dict[str, object]) -> None:
    config = megatron_config(MOEPP, **changes)
    assert not suits(config)
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    assert spec.submodules.mlp.keywords["submodules"].experts.func is SequentialMLP
