"""reference.py, the definition: against numbers by hand and against other ways to write it."""

import math

import pytest
import torch
import torch.nn.functional as F

from moepp_megatron.experts import CONSTANT, COPY, ZERO
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import ReferenceMoEPP, balance_loss, select_experts
from moepp_megatron.moe.reference import within_capacity as reference_within_capacity
from tests.unit.moe.builders import DEFINED_SCORES, assert_close, of_kinds

D, H = 6, 5
# Experts of HAND: FFN 0, FFN 1, constant 2, copy 3, zero 4.
HAND = {"num_ffn_experts": 2, "num_constant_experts": 1, "num_copy_experts": 1}
# softmax gives (0.1, 0.4, 0.05, 0.15, 0.3).
LOGITS = torch.tensor([[0.1, 0.4, 0.05, 0.15, 0.3]]).log()


def approx(values):
    # A handful of fp32 operations.
    return pytest.approx(values, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(
    ("normalization", "topk", "expected"),
    [
        ("none", 2, [0, 0.4, 0, 0, 0.3]),
        ("none", 3, [0, 0.4, 0, 0.15, 0.3]),
        ("selected", 2, [0, 4 / 7, 0, 0, 3 / 7]),
        ("selected", 3, [0, 8 / 17, 0, 3 / 17, 6 / 17]),
        ("nonzero", 2, [0, 1, 0, 0, 0]),
        ("nonzero", 3, [0, 8 / 11, 0, 3 / 11, 0]),
    ],
)
def test_gates_by_hand(normalization, topk, expected):
    config = MoEPPConfig(**HAND, router_topk=topk, gate_normalization=normalization)
    gates, selected, scores = select_experts(LOGITS, config)
    assert gates[0].tolist() == approx(expected)
    picks = {2: [1, 4], 3: [1, 3, 4]}[topk]
    assert selected[0].nonzero().squeeze(-1).tolist() == picks
    assert scores[0].tolist() == approx([0.1, 0.4, 0.05, 0.15, 0.3])


def test_sigmoid_by_hand():
    config = MoEPPConfig(**HAND, score_function="sigmoid")
    logits = torch.tensor([[0.0, math.log(3), -math.log(3), math.log(4), -10.0]])
    gates, _, scores = select_experts(logits, config)
    assert gates[0].tolist() == approx([0, 0.75, 0, 0.8, 0])
    last = 1 / (1 + math.exp(10))
    total = 0.5 + 0.75 + 0.25 + 0.8 + last
    # The balance loss averages probabilities, so the scores are divided by their sum.
    assert scores[0].tolist() == approx([x / total for x in (0.5, 0.75, 0.25, 0.8, last)])


def test_logits_norm_by_hand():
    # Mean 2, unbiased standard deviation sqrt(10 / 4): scaled to 3 before the softmax.
    config = MoEPPConfig(**HAND, logits_norm_std=3.0)
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    factor = 3.0 / math.sqrt(2.5)
    exponentials = [math.exp(factor * z) for z in range(5)]
    gates, _, _ = select_experts(logits, config)
    expected = [0, 0, 0, exponentials[3] / sum(exponentials), exponentials[4] / sum(exponentials)]
    assert gates[0].tolist() == approx(expected)


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5)])
def test_experts_by_hand(scale, temperature):
    config = MoEPPConfig(**HAND, expert_input_scale=scale, constant_temperature=temperature)
    layer = ReferenceMoEPP(config, 2, 1)
    with torch.no_grad():
        layer.expert_in.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]]]))
        layer.expert_out.copy_(torch.tensor([[[1.0], [3.0]], [[2.0], [0.0]]]))
        layer.constants.copy_(torch.tensor([[5.0, 7.0]]))
        layer.mixing_weight.copy_(torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]]))
    x = torch.tensor([[1.0, 2.0]]) * scale

    def silu(value):
        return value / (1 + math.exp(-value))

    a, b = 1.0 * scale, 2.0 * scale
    keep = 3 ** (a / temperature) / (3 ** (a / temperature) + 1)
    expected = [
        [silu(a) * b, 3 * silu(a) * b],
        [2 * silu(2 * b) * a, 0.0],
        [keep * a + (1 - keep) * 5, keep * b + (1 - keep) * 7],
        [a, b],
        [0.0, 0.0],
    ]
    for index, values in enumerate(expected):
        assert layer.expert(index, x)[0].tolist() == approx(values)

    # The whole layer: gates 0.4 of FFN 1 and 0.3 of the zero expert, as LOGITS above; the router
    # sees the unscaled input.
    with torch.no_grad():
        layer.gate_weights[0].copy_(torch.stack([LOGITS[0], torch.zeros(5)], dim=1))
        layer.residual_weight.zero_()
    output = layer(torch.tensor([[1.0, 2.0]]), torch.randn(1, 5))
    assert output.logits_TE[0].tolist() == approx(LOGITS[0].tolist())
    assert output.hidden_TD[0].tolist() == approx([0.4 * value for value in expected[1]])


@pytest.mark.parametrize("two_layer_gate", [False, True])
def test_gate_and_residual_by_hand(two_layer_gate):
    config = MoEPPConfig(**HAND, two_layer_gate=two_layer_gate)
    layer = ReferenceMoEPP(config, D, H)
    x, previous = torch.randn(4, D), torch.randn(4, 5)
    logits = x @ layer.gate_weights[0].T
    if two_layer_gate:
        assert layer.gate_weights[0].shape == (8 * 5, D)
        logits = torch.tanh(logits) @ layer.gate_weights[1].T
    assert_close(layer.route(x, None), logits, "logits without residual")
    logits = logits + previous @ layer.residual_weight.T
    assert_close(layer.route(x, previous), logits, "logits with residual")
    assert ReferenceMoEPP(config, D, H, has_residual=False).residual_weight is None


def dense(layer, x, gates):
    """Every expert on every token, in one expression a kind; no token is gathered."""
    config = layer.config
    scaled = x * config.expert_input_scale
    gate, up = torch.einsum("td,ehd->teh", scaled, layer.expert_in).chunk(2, dim=-1)
    ffn = torch.einsum("teh,edh->ted", F.silu(gate) * up, layer.expert_out)
    output = torch.einsum("te,ted->td", gates[:, : config.num_ffn_experts], ffn)
    mixing = torch.softmax(torch.einsum("td,cmd->tcm", scaled, layer.mixing_weight), dim=-1)
    constant = gates[:, config.columns(CONSTANT)]
    keep = (constant * mixing[..., 0]).sum(dim=-1) + gates[:, config.columns(COPY)].sum(dim=-1)
    return output + keep[:, None] * scaled + (constant * mixing[..., 1]) @ layer.constants


@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
@pytest.mark.parametrize("score_function", DEFINED_SCORES)
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_equals_the_dense_evaluation(normalization, score_function, capacity_factor):
    config = MoEPPConfig(
        3,
        num_zero_experts=2,
        router_topk=3,
        gate_normalization=normalization,
        score_function=score_function,
        capacity_factor=capacity_factor,
        expert_input_scale=3.0,
    )
    layer = ReferenceMoEPP(config, D, H)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, previous = torch.randn(30, D), torch.randn(30, config.num_experts)
    output = layer(x, previous)
    weight = torch.randn(30, D)
    gradients = torch.autograd.grad(
        (output.hidden_TD * weight).sum(), list(layer.parameters()), materialize_grads=True
    )
    # Gates written with indices instead of masks.
    logits = layer.route(x, previous)
    scores = DEFINED_SCORES[score_function](logits)
    chosen = scores.topk(3, dim=-1).indices
    rows = []
    for token, picks in enumerate(chosen.tolist()):
        values = {pick: scores[token, pick] for pick in picks}
        if normalization == "nonzero":
            values = {pick: v for pick, v in values.items() if pick < config.columns(ZERO).start}
        if normalization != "none" and values:
            total = sum(values.values())
            values = {pick: v / total for pick, v in values.items()}
        zero = logits.new_zeros(())
        rows.append(torch.stack([values.get(e, zero) for e in range(config.num_experts)]))
    gates = torch.stack(rows)
    if capacity_factor is not None:
        kept = reference_within_capacity(gates, output.selected_TE, config)
        assert (output.selected_TE & ~kept).any()
        gates = gates * kept
    assert_close(output.gates_TE, gates, "gates")
    expected = dense(layer, x, gates)
    assert_close(output.hidden_TD, expected, "output")
    expected_gradients = torch.autograd.grad(
        (expected * weight).sum(), list(layer.parameters()), materialize_grads=True
    )
    names = [name for name, _ in layer.named_parameters()]
    for name, actual, wanted in zip(names, gradients, expected_gradients, strict=True):
        assert_close(actual, wanted, f"gradient of {name}")


def test_capacity_by_hand_with_ties():
    # Limits with T = 4, K = 1, tau = 1, gamma = 1, F = Z = 1: ceil(4 / 2) = 2 each.
    config = of_kinds(
        (1, 0, 1, 0),
        1,
        tau=1.0,
        capacity_factor=1.0,
    )
    gates = torch.tensor([[0.6, 0.0], [0.9, 0.0], [0.6, 0.0], [0.0, 0.8]])
    kept = reference_within_capacity(gates, gates > 0, config)
    assert kept.tolist() == [[True, False], [True, False], [False, False], [False, True]]


def test_dropped_selections_return_nothing_and_gates_are_not_renormalised():
    config = of_kinds(
        (1, 0, 1, 0),
        2,
        tau=1.0,
        capacity_factor=0.5,
        gate_normalization="selected",
    )
    layer = ReferenceMoEPP(config, D, H, has_residual=False)
    with torch.no_grad():
        layer.gate_weights[0].zero_()
        layer.gate_weights[0][1, 0] = 1.0
    x = torch.randn(4, D)
    x[:, 0] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    output = layer(x)
    # Two of four selections stay with each expert: the largest gates.
    copy_gate = torch.sigmoid(x[:, 0])
    assert output.gates_TE[:, 1].tolist() == approx(
        [0, copy_gate[1].item(), 0, copy_gate[3].item()]
    )
    assert output.gates_TE[:, 0].tolist() == approx([0.5, 0, 1 - copy_gate[2].item(), 0])
    assert_close(output.hidden_TD[1], copy_gate[1] * x[1], "output of token 1")
    assert output.selected_TE.all()


def test_balance_loss_by_hand():
    # f = (1, 0.5, 0, 0, 0.5), P = the mean of the two rows, eta = (1, 1, .75, .75, .75).
    config = MoEPPConfig(**HAND)
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.05, 0.05], [0.3, 0.1, 0.1, 0.05, 0.45]])
    selected = torch.tensor([[True, True, False, False, False], [True, False, False, False, True]])
    expected = 1.0 * 0.4 + 0.5 * 0.2 + 0.75 * 0.5 * 0.25
    assert balance_loss(scores, selected, config).item() == approx(expected)


def test_balance_loss_counts_selections_before_the_capacity_limit():
    config = MoEPPConfig(**HAND, capacity_factor=0.01)
    layer = ReferenceMoEPP(config, D, H, has_residual=False)
    x = torch.randn(12, D)
    output = layer(x)
    _, selected, scores = select_experts(layer.route(x, None), config)
    assert (output.gates_TE > 0).sum() < selected.sum()
    assert output.balance_loss.item() == approx(balance_loss(scores, selected, config).item())
