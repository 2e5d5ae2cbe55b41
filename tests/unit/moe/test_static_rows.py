"""The layer with static rows against the layer that sizes its rows: output, gradients, fill."""

from functools import partial

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from moepp_megatron.layer_settings import static_rows
from moepp_megatron.moe import spec
from moepp_megatron.moe.local_experts import GroupedExperts
from tests.unit.moe import builders

SHAPE = (12, 8)
TOPK = 2
BF16 = {"bf16": True, "params_dtype": torch.bfloat16}


def layer_of(rows_per_selection, is_static, **changes):
    moepp = builders.of_kinds((8, 1, 1, 2), TOPK, static_rows=rows_per_selection)
    torch.manual_seed(1)
    layer = builders.build_layer(moepp, **changes).train()
    layer.is_static = is_static
    return layer


def results(rows_per_selection, is_static, padded=False):
    """Output, gradients by name and fill of a layer on the same weights and inputs."""
    layer = layer_of(rows_per_selection, is_static)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*SHAPE, builders.HIDDEN, generator=generator).requires_grad_()
    previous = torch.randn(*SHAPE, 12, generator=generator).requires_grad_()
    mask = torch.zeros(SHAPE[1], SHAPE[0], dtype=torch.bool)
    mask[:, -3:] = True
    output, logits = layer(x, previous, padding_mask=mask if padded else None)
    (output.square().sum() + logits.sin().sum()).backward()
    gradients = {name: each.grad for name, each in layer.named_parameters()}
    gradients |= {"x": x.grad, "previous": previous.grad}
    fill = layer.statistics.fill
    return output.detach(), gradients, None if fill is None else float(fill)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [0.9, 1.0, 5.0])
def test_static_rows_compute_the_same(rows, padded):
    output, gradients, fill = results(rows, True, padded)
    expected, expected_gradients, _ = results(None, False, padded)
    assert 0.0 < fill <= 1.0
    assert torch.equal(output, expected)
    for name, gradient in expected_gradients.items():
        largest = gradient.abs().max()
        # Sums over rows of one token may be in another order.
        assert (gradients[name] - gradient).abs().max() <= 1e-6 * largest, name


def test_too_few_rows_are_seen():
    output, _, fill = results(0.3, True)
    expected, _, _ = results(None, False)
    assert fill > 1.0
    assert not torch.equal(output, expected)
    dynamic, _, seen = results(0.3, False)
    assert seen == fill
    assert torch.equal(dynamic, expected)


def test_rows_that_hold_nothing_reach_nothing(monkeypatch):
    """Products leave them out, so their memory may hold anything."""

    def filled(tensor, *args, **kwargs):
        return torch.full_like(tensor, torch.nan)

    monkeypatch.setattr("moepp_megatron.moe.local_experts.torch.empty_like", filled)
    output, gradients, _ = results(1.0, True)
    assert output.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_rows_of_each_token_for_kernels():
    """The table by which kernels add up rows: those that the sum without kernels takes."""
    layer = layer_of(0.9, True)
    with torch.no_grad():
        layer(torch.randn(*SHAPE, builders.HIDDEN), torch.randn(*SHAPE, 12))
    dispatcher = layer.token_dispatcher
    rows = torch.randn(dispatcher.rows_to_peer, builders.HIDDEN)
    taken, table = dispatcher.combine_rows(dispatcher.token_combine(rows))
    padded = torch.cat([taken, torch.zeros(1, builders.HIDDEN)])
    added = dispatcher.combine_postprocess(dispatcher.token_combine(rows))
    torch.testing.assert_close(padded[table.long()].sum(dim=1), added.view(-1, builders.HIDDEN))


def test_the_bound_is_exact_and_at_most_all_selections():
    # 110.00000000000001 in floating point.
    assert static_rows(0.55, 2, 100) == 110
    assert static_rows(0.75, 8, 4096, 8) == 3072
    assert static_rows(64.0, 2, 10) == 20


def test_evaluation_is_not_static():
    layer = layer_of(0.1, True).eval()
    with torch.no_grad():
        layer(torch.randn(*SHAPE, builders.HIDDEN), torch.zeros(*SHAPE, 12))
    assert type(layer.token_dispatcher).__name__ == "FFNAlltoAllTokenDispatcher"
    assert layer.statistics.fill is None


def passes(is_static):
    """A function of input and logits before: output of a layer and all gradients."""
    layer = layer_of(0.9, is_static, **BF16).bfloat16()
    assert type(layer.experts) is GroupedExperts

    def both(x, previous):
        inputs = [x.detach().requires_grad_(), previous.detach().requires_grad_()]
        output, logits = layer(*inputs)
        loss = output.square().sum() + logits.sin().sum()
        return output.detach(), *torch.autograd.grad(loss, [*inputs, *layer.parameters()])

    return both


def inputs():
    return torch.randn(*SHAPE, builders.HIDDEN).bfloat16(), torch.randn(*SHAPE, 12)


def test_forward_and_backward_are_one_graph_for_every_routing(monkeypatch):
    """Traced with tensors without numbers, which nothing can read, with the products of a GPU.

    Not by `torch.compile`, which cannot trace megatron-core's `MoEAuxLossAutoScaler.backward`.
    """
    monkeypatch.setattr(GroupedExperts, "suits", spec.CPUExperts.suits)
    monkeypatch.setattr(spec, "CPUExperts", GroupedExperts)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    trace = partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
    graph = trace(passes(True))(*inputs())
    with pytest.raises(GuardOnDataDependentSymNode):
        trace(passes(False))(*inputs())
    destroy_moe_metrics_tracker()
    eager = passes(True)
    for _ in range(2):
        given = inputs()
        with torch.no_grad():
            found = graph(*given)
        for mine, expected in zip(found, eager(*given), strict=True):
            assert torch.equal(mine, expected)
