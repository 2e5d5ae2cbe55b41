"""Router health: every sum against its definition, counted once, nothing when it is off."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moepp_megatron.experts import CONSTANT
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.router_health import RouterHealth
from tests.parallel.training_runs import SELECTIVE
from tests.unit.moe.builders import DEFINED_SCORES, HIDDEN, build_layer

TOKENS, BATCH = 7, 3


def measured(moepp, recompute=False, enabled=True):
    """A layer after one pass, its inputs and its router logits."""
    changes = {}
    if recompute:
        changes = SELECTIVE
    torch.manual_seed(2)
    layer = build_layer(moepp, **changes)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.5))
    layer.router.health.enabled = enabled
    x = torch.randn(TOKENS, BATCH, HIDDEN, requires_grad=True)
    previous = torch.randn(TOKENS, BATCH, moepp.num_experts, requires_grad=True)
    output, logits = layer(x, previous)
    (output.square().sum() + 0.1 * logits.square().sum()).backward()
    return layer, x, previous, logits.detach()


def sums_of(layer):
    names = RouterHealth.names_for(layer.moepp.router_topk)
    return dict(zip(names, layer.router.health.as_vector().tolist(), strict=True))


@pytest.mark.parametrize("score_function", DEFINED_SCORES)
@pytest.mark.parametrize(("recompute", "std"), [(False, None), (True, None), (False, 0.7)])
def test_sums_are_their_definitions(score_function, recompute, std):
    moepp = MoEPPConfig(4, router_topk=2, score_function=score_function, logits_norm_std=std)
    layer, x, previous, logits = measured(moepp, recompute=recompute)
    sums = sums_of(layer)
    logits = logits.view(-1, moepp.num_experts).double()
    own = (x.detach().view(-1, HIDDEN) @ layer.router.weight.detach().T).double()
    residual = previous.detach().view(-1, 8).double() @ layer.router.residual_weight.double().T
    if std is not None:
        scale = std / logits.std(dim=-1, keepdim=True)
        logits, own, residual = logits * scale, own * scale, residual * scale
    scores = DEFINED_SCORES[score_function](logits)
    shares = scores / scores.sum(-1, keepdim=True)
    ordered = scores.sort(-1, descending=True)
    ffn = (ordered.indices[:, :2] < 4).sum(-1)
    expected = {
        "tokens": 21,
        "logits": 21 * 8,
        "entropy": -(shares * shares.log()).sum(),
        "margin": (ordered.values[:, 1] - ordered.values[:, 2]).sum(),
        "logit": logits.sum(),
        "logit_square": logits.square().sum(),
        "own_logit": own.sum(),
        "own_logit_square": own.square().sum(),
        "own_norm": own.norm(dim=-1).sum(),
        "residual_norm": residual.norm(dim=-1).sum(),
        **{f"tokens_with_{count}_ffn": (ffn == count).sum() for count in range(3)},
    }
    for name, value in expected.items():
        # Sums of 168 fp32 numbers near 1.
        value = float(torch.as_tensor(value).detach())
        assert sums[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_the_first_layer_has_no_part_of_a_residual():
    layer = build_layer(MoEPPConfig(4, logits_norm_std=0.7), has_residual=False)
    layer.router.health.enabled = True
    layer(torch.randn(TOKENS, BATCH, HIDDEN))
    sums = sums_of(layer)
    assert sums["residual_norm"] == 0.0
    assert sums["own_logit_square"] == sums["logit_square"]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_constant_experts_and_rows(temperature):
    moepp = MoEPPConfig(4, num_constant_experts=2, constant_temperature=temperature)
    layer, x, previous, _ = measured(moepp)
    layer.router.health.add_rows(layer.router.logits_weight)
    sums = sums_of(layer)
    gates = layer.router(x, previous).gates.detach()[:, moepp.columns(CONSTANT)].double()
    tokens = x.detach().view(-1, HIDDEN)
    weight = layer.zero_computation.mixing_weight.detach()
    mixing = torch.einsum("td,ckd->tck", tokens, weight / temperature).softmax(-1).double()
    rows = torch.nn.functional.normalize(layer.router.weight.detach().double(), dim=-1)
    cosines = (rows @ rows.T).abs().fill_diagonal_(0)
    assert sums["constant_gate"] == pytest.approx(gates.sum().item(), rel=1e-5)
    replaced = (gates * mixing[:, :, 1]).sum().item()
    assert sums["constant_replaced"] == pytest.approx(replaced, rel=1e-5, abs=1e-7)
    norms = [layer.zero_computation.constants[index].norm().item() for index in range(2)]
    assert sums["constant_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5)
    count = len(rows)
    assert sums["copies"] == 1
    assert sums["row_cosine"] == pytest.approx(
        cosines.sum().item() / (count * count - count), rel=1e-5
    )
    assert sums["row_cosine_max"] == pytest.approx(cosines.max().item(), rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_two_losses_are_told_apart(recompute):
    def squares(beta):
        moepp = MoEPPConfig(4, balance_coeff=beta)
        layer, *_ = measured(moepp, recompute=recompute)
        sums = sums_of(layer)
        return sums["balance_grad_square"], sums["model_grad_square"]

    small, model = squares(0.01)
    large, same_model = squares(1.0)
    assert small > 0
    # The gradient is linear in beta, and the model's does not know of it.
    assert large == pytest.approx(small * 1e4, rel=1e-4)
    assert same_model == pytest.approx(model, rel=1e-4)


def test_measuring_changes_no_bit():
    def found(enabled):
        """Logits and gradients, which follow from the output."""
        layer, x, previous, logits = measured(MoEPPConfig(4), enabled=enabled)
        return [logits, x.grad, previous.grad, *(p.grad for p in layer.parameters())]

    for off, on in zip(found(False), found(True), strict=True):
        assert torch.equal(off, on)


def test_nothing_is_measured_when_it_is_off_or_in_evaluation():
    layer = build_layer(MoEPPConfig(4))
    x, previous = torch.randn(TOKENS, BATCH, HIDDEN), torch.randn(TOKENS, BATCH, 8)
    layer(x, previous)
    assert layer.router.health.as_vector().abs().sum() == 0
    layer.router.health.enabled = True
    layer.eval()
    layer(x, previous)
    assert layer.router.health.as_vector().abs().sum() == 0


def test_no_token_and_all_experts_selected():
    moepp = MoEPPConfig(2, num_constant_experts=0, router_topk=4)
    layer, *_ = measured(moepp)
    sums = sums_of(layer)
    assert sums["margin"] == 0
    assert sums["tokens_with_2_ffn"] == 21
    assert sums["balance_grad_square"] >= 0
