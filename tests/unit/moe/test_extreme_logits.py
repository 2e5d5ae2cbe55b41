"""Logits at the edges of fp32: gates, balance loss and gradients against the definition in fp64."""

from types import SimpleNamespace

import pytest
import torch

from moepp_megatron.experts import ZERO
from moepp_megatron.moe import reference, selection
from moepp_megatron.moe.config import LEAST_LOGIT_STD, MoEPPConfig
from moepp_megatron.moe.reference import select_experts
from tests.unit.moe.builders import DEFINED_SCORES, HIDDEN, assert_close, build_layer, reference_of
from tests.unit.moe.test_kernels import DEVICE, compiled  # noqa: F401

GAPS = (0.0, 1.0, 20.0, 60.0, 82.0, 87.0, 95.0, 102.0, 104.0, 150.0, 200.0)
# Gates and gradients at most 1, of logits up to 200: their spacing in fp32 is 1.5e-5, and a
# logarithm that is off by that is a factor that is off by as much.
TOLERANCE = 5e-5


def edge_config(**changes):
    return MoEPPConfig(**({"num_ffn_experts": 4, "router_topk": 3} | changes))


def gapped_logits(function):
    """[gaps, E]: one zero expert first under softmax, then what is selected besides it."""
    below = torch.tensor([-1.0, 0.5, 0.25, -2.0, -0.5, -3.0, -1.5, 0.0])
    logits = below - torch.tensor(GAPS)[:, None]
    # The last expert is the zero expert.
    logits[:, -1] = 0.75 if function == "softmax" else 0.75 - torch.tensor(GAPS)
    return logits


def by_definition(logits, config):
    """Gates [T, E] and probabilities [T, E] by divisions, in fp64."""
    z = logits.double()
    scores = DEFINED_SCORES[config.score_function](z)
    chosen = z.argsort(dim=-1, descending=True, stable=True)[:, : config.router_topk]
    gates = torch.where(torch.zeros_like(z).scatter(1, chosen, 1.0) > 0, scores, 0.0)
    if config.gate_normalization == "nonzero":
        gates = gates * (torch.arange(config.num_experts) < config.columns(ZERO).start)
    if config.gate_normalization != "none":
        gates = gates / gates.sum(dim=-1, keepdim=True)
    return gates, scores / scores.sum(dim=-1, keepdim=True)


def by_layer(logits, config):
    chosen = selection.select(logits, None, config, logits.shape[0])
    assert chosen.score_sums is not None
    return chosen.gates, chosen.score_sums


def by_reference(logits, config):
    gates, _, probabilities = select_experts(logits, config)
    return gates, probabilities


def by_kernel(logits, config):
    from moepp_megatron.moe.kernels.router import select

    # Each token a sequence of its own, so that sums are those of single tokens.
    chosen = select(logits.to(DEVICE), None, config, logits.shape[0])
    return chosen.gates.cpu(), chosen.score_sums.cpu()


def by_export(logits, config):
    pytest.importorskip("transformers")
    from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPGate

    told = SimpleNamespace(
        logits_norm_std=config.logits_norm_std,
        score_function=config.score_function,
        gate_normalization=config.gate_normalization,
        gate_scale=config.gate_scale,
        selection_bias=False,
        num_experts_per_tok=config.router_topk,
        total_experts=config.num_experts,
        num_zero_experts=config.num_zero_experts,
        num_groups=config.num_groups,
        group_topk=config.group_topk,
    )
    gate = MoEPPGate.__new__(MoEPPGate)
    torch.nn.Module.__init__(gate)
    gate.config = told
    gates, chosen = gate.select(logits)
    return torch.zeros_like(logits).scatter(1, chosen, gates), None


PLACES = {"layer": by_layer, "reference": by_reference, "kernel": by_kernel, "exported": by_export}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
@pytest.mark.parametrize("function", DEFINED_SCORES)
def test_gaps_of_logits(function, normalization, place):
    config = edge_config(score_function=function, gate_normalization=normalization)
    to_gates, to_shares = torch.randn(2, len(GAPS), config.num_experts)

    def run(select):
        leaf = gapped_logits(function).requires_grad_()
        gates, shares = select(leaf, config)
        loss = (gates * to_gates).sum()
        found = [gates]
        if shares is not None and place != "exported":
            loss = loss + (shares * to_shares).sum()
            found.append(shares)
        return [*found, *torch.autograd.grad(loss, leaf)]

    for actual, expected in zip(run(PLACES[place]), run(by_definition), strict=True):
        # A token at a time: one with large values must not hide another.
        for gap, mine, theirs in zip(GAPS, actual, expected, strict=True):
            assert mine.isfinite().all(), f"gap {gap}"
            error = (mine.double() - theirs.double()).abs().max().item()
            assert error <= TOLERANCE, f"gap {gap}: {error}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("function", DEFINED_SCORES)
def test_all_picks_zero_experts(function, place):
    config = edge_config(num_zero_experts=3, gate_normalization="nonzero", score_function=function)
    leaf = torch.tensor([[0.0] * 7 + [90.0] * 3, [-300.0] * 7 + [300.0] * 3], requires_grad=True)
    gates, _ = PLACES[place](leaf, config)
    assert torch.equal(gates, torch.zeros_like(gates))
    (grad,) = torch.autograd.grad(gates.sum(), leaf)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("place", ["layer", "reference", "exported"])
def test_standardized_logits_that_are_equal(place):
    """A token of zeros, as padding is, and one whose logits differ only by rounding."""
    std = 1.5
    logits = torch.randn(4, 8)
    logits[1], logits[2] = 0.0, 3.0
    logits[2, 5] += 2.5e-7

    def scores(values, where):
        config = edge_config(logits_norm_std=std, router_topk=8)
        if where == "layer":
            standardized = selection.standardized(values, std)
            return selection.select(standardized, None, config, None).gates
        return (by_export if where == "exported" else by_reference)(values, config)[0]

    leaf = logits.clone().requires_grad_()
    found = scores(leaf, place)
    (grad,) = torch.autograd.grad((found * torch.arange(8)).sum(), leaf)
    assert grad.isfinite().all()
    # Values and gradients of the others are those without a bound.
    plain = logits.clone().requires_grad_()
    expected = torch.softmax(plain * (std / plain.std(dim=-1, keepdim=True)), dim=-1)
    (plain_grad,) = torch.autograd.grad((expected * torch.arange(8))[[0, 3]].sum(), plain)
    # Two softmaxes of fp32, in the same order but for the way to the gates.
    torch.testing.assert_close(found[[0, 3]], expected[[0, 3]], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[[0, 3]], plain_grad[[0, 3]], rtol=1e-5, atol=1e-6)
    # What rounding has left, here 2.4e-7 / 1e-6 times 1.5, decides next to nothing.
    assert torch.equal(found[1], torch.full((8,), 0.125))
    assert found[2].max() <= 2.0 * found[2].min()


def test_the_bound_is_above_rounding_and_far_below_logits():
    # Logits of order 10 have a spacing of 9.5e-7.
    assert torch.nextafter(torch.tensor(10.0), torch.tensor(11.0)) - 10.0 <= LEAST_LOGIT_STD
    assert reference.LEAST_LOGIT_STD == LEAST_LOGIT_STD


def test_a_layer_trains_through_a_token_of_zeros():
    config = edge_config(logits_norm_std=1.0, gate_normalization="nonzero", balance_coeff=0.1)
    layer = build_layer(config, has_residual=False)
    x = torch.randn(6, 2, HIDDEN)
    x[2, 1] = 0.0
    x.requires_grad_()
    output, logits = layer(x)
    output.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    found = {"output": output, "logits": logits, "input": x.grad, **grads}
    assert [name for name, value in found.items() if not value.isfinite().all()] == []
    expected = reference_of(layer)(x.detach().view(12, HIDDEN)).hidden_TD
    assert_close(output.view(12, HIDDEN), expected, "output")
