"""Experts in a loop on a CPU, and grouped, against megatron-core's `SequentialMLP`."""

from functools import partial

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from moepp_megatron.moe import local_experts
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.local_experts import CPUExperts, GroupedExperts
from moepp_megatron.moe.spec import get_moepp_layer_spec
from tests.unit.moe.builders import FFN_HIDDEN, HIDDEN, megatron_config

MOEPP = MoEPPConfig(4)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU megatron-core's own experts are used"
)


def both(dtype, kind=CPUExperts):
    """Theirs and ours, with equal weights."""
    config = megatron_config(MOEPP, params_dtype=dtype, bf16=dtype is torch.bfloat16)
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    builder = spec.submodules.mlp.keywords["submodules"].experts
    assert builder.func is CPUExperts
    groups = get_default_pg_collection()
    ours = partial(kind, **builder.keywords)(4, config, pg_collection=groups)
    theirs = partial(SequentialMLP, **builder.keywords)(4, config, pg_collection=groups)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.copy_(torch.randn(mine.shape, generator=generator) * 0.3)
            other.copy_(mine)
    return theirs, ours


def run(experts, rows, dtype):
    """Output without and with gradients, and those of input, gates and parameters."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(sum(rows), HIDDEN, generator=generator).to(dtype).requires_grad_()
    gates = torch.rand(sum(rows), generator=generator).requires_grad_()
    with torch.no_grad():
        evaluated, _ = experts(tokens, torch.tensor(rows), gates)
    output, bias = experts(tokens, torch.tensor(rows), gates)
    assert bias is None
    assert evaluated.dtype is output.dtype is dtype
    output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    grads = [tokens.grad, gates.grad, *(p.grad for p in experts.parameters())]
    for index, grad in enumerate(grads):
        # An expert without tokens: its gradient is none or zeros.
        grads[index] = torch.zeros(()) if grad is None else grad
    return [evaluated, output.detach(), *grads]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "rows", [[5, 1, 0, 9], [0, 0, 7, 0], [0, 1, 0, 0], [0, 0, 0, 0], [300, 2, 40, 170]], ids=str
)
@pytest.mark.parametrize(
    ("kind", "large"),
    [(CPUExperts, 1), (CPUExperts, local_experts._LARGE), (GroupedExperts, local_experts._LARGE)],
    ids=["oneDNN", "torch", "grouped"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_equals_sequential_mlp(rows, dtype, tolerance, kind, large, monkeypatch):
    monkeypatch.setattr(local_experts, "_LARGE", large)
    theirs, ours = both(dtype, kind)
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


@pytest.mark.parametrize("kind", [CPUExperts, GroupedExperts])
def test_frozen_weights_get_no_gradient(kind):
    _, ours = both(torch.float32, kind)
    for parameter in ours.parameters():
        parameter.requires_grad_(False)
    tokens = torch.randn(4, HIDDEN, requires_grad=True)
    output, _ = ours(tokens, torch.tensor([1, 1, 1, 1]), torch.ones(4))
    output.sum().backward()
    assert tokens.grad is not None
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_grouped_products_keep_no_copy_of_the_weights():
    """Saved for the backward pass: what a loop saves, and parameters themselves."""
    _, ours = both(torch.bfloat16, GroupedExperts)
    kept = []
    own = {parameter.data_ptr() for parameter in ours.parameters()}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(ours, [5, 1, 0, 9], torch.bfloat16)
    others = [tensor.shape for tensor in kept if tensor.data_ptr() not in own]
    assert sorted(others) == sorted([(15, HIDDEN), (15,), (4,), (15, 2 * FFN_HIDDEN)])


@pytest.mark.parametrize(
    ("changes", "capability", "fits"),
    [
        ({}, (9, 0), True),
        ({}, (10, 0), True),
        ({}, (8, 0), False),
        ({"params_dtype": torch.float32, "bf16": False}, (9, 0), False),
        ({"moe_ffn_hidden_size": 28}, (9, 0), False),
        ({"gated_linear_unit": False}, (9, 0), False),
    ],
)
def test_where_experts_are_grouped(monkeypatch, changes, capability, fits):
    bf16 = {"params_dtype": torch.bfloat16, "bf16": True}
    config = megatron_config(MOEPP, **(bf16 | changes))
    assert not GroupedExperts.suits(config), "no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert GroupedExperts.suits(config) == fits
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    found = spec.submodules.mlp.keywords["submodules"].experts.func
    assert found is (GroupedExperts if fits else SequentialMLP)


@pytest.mark.parametrize(
    "changes",
    [{"gated_linear_unit": False}, {"activation_func": torch.relu}, {"add_bias_linear": True}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_experts_stay_with_megatron_core(changes):
    config = megatron_config(MOEPP, **changes)
    assert not CPUExperts.suits(config)
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    assert spec.submodules.mlp.keywords["submodules"].experts.func is SequentialMLP
