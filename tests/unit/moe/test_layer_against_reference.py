"""The parallel layer against reference.py: outputs, logits and every gradient."""

import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moepp_megatron.experts import ZERO
from moepp_megatron.layer_settings import DECLARED
from moepp_megatron.moe.capacity import capacities
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import MoEPPLayer
from moepp_megatron.moe.reference import (
    ReferenceMoEPP,
    _ReferenceOutput,
    balance_loss,
    select_experts,
)
from moepp_megatron.moe.statistics import Z_LOSS
from tests.unit.moe.builders import HIDDEN, assert_close, build_layer, gradient_pairs, reference_of

# Zero, copy and constant experts.
MIXTURES = {
    "all kinds": (1, 1, 2),
    "no zero": (0, 1, 2),
    "no copy": (2, 0, 1),
    "no constant": (1, 2, 0),
    "only zero": (2, 0, 0),
    "none": (0, 0, 0),
}
DISPATCHERS = ("alltoall", "alltoall_dedup", "allgather")
AXES = {
    "gate_normalization": ("none", "selected", "nonzero"),
    "score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "mixture": tuple(MIXTURES),
    "capacity_factor": (None, 0.6),
    "two_layer_gate": (False, True),
    "expert_input_scale": (1.0, 2.0),
    "has_residual": (True, False),
    "balance_scope": ("microbatch", "sequence", "global"),
    "balance_loss": ("heterogeneous", "grouped"),
    "calculate_per_token_loss": (True, False),
    "dispatcher": DISPATCHERS,
    "logits_norm_std": (None, 1.5),
    "constant_temperature": (1.0, 0.4),
    "moe_z_loss_coeff": (None, 0.3),
}
CROSSED = ("gate_normalization", "score_function", "mixture", "capacity_factor")


@dataclass
class Run:
    """The results of a layer and of the reference for the same tokens, gradients taken."""

    layer: MoEPPLayer
    reference: ReferenceMoEPP
    hidden: Tensor
    logits: Tensor
    expected: _ReferenceOutput
    padded: Tensor
    balance: Tensor
    z_loss: Tensor
    input_grads: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def check(self):
        width = self.expected.logits_TE.shape[-1]
        assert self.logits.dtype is torch.float32
        assert_close(self.hidden.view(-1, HIDDEN), self.expected.hidden_TD, "output")
        assert_close(self.logits.view(-1, width), self.expected.logits_TE, "logits")
        for name, (actual, expected) in self.input_grads.items():
            assert_close(actual.view(expected.shape), expected, f"gradient of {name}")
        for name, actual, expected in gradient_pairs(self.layer, self.reference):
            assert_close(actual, expected, f"gradient of {name}")
        statistics, moepp = self.layer.statistics, self.layer.moepp
        counts, tokens = self.expected.selected_TE.sum(dim=0), int((~self.padded).sum())
        assert statistics.selected.tolist() == counts.tolist()
        assert statistics.num_tokens == tokens
        if moepp.balance_coeff:
            assert_close(statistics.balance_loss, self.balance, "balance loss")
        if Z_LOSS in statistics.losses:
            total, weight = statistics.losses[Z_LOSS]
            assert_close(total / weight, self.z_loss, "z-loss")
        if moepp.capacity_factor is not None:
            limits = torch.tensor(capacities(moepp, tokens), device=counts.device)
            assert statistics.dropped == (counts - limits).clamp(min=0).sum()


def case_settings():
    """Every combination of the crossed settings twice, with drawn values of the others."""
    cases = []
    others = [name for name in AXES if name not in CROSSED]
    draw = random.Random(5)
    for values in itertools.product(*(AXES[name] for name in CROSSED), range(2)):
        case = dict(zip(CROSSED, values[:-1], strict=True))
        case |= {name: draw.choice(AXES[name]) for name in others}
        cases.append(case)
    return cases


CASES = case_settings()


def case_id(case):
    return "-".join(str(value).replace(" ", "_") for value in case.values())


def test_every_pair_of_settings_meets():
    for (name_a, values_a), (name_b, values_b) in itertools.combinations(AXES.items(), 2):
        met = {(case[name_a], case[name_b]) for case in CASES}
        assert met == set(itertools.product(values_a, values_b)), (name_a, name_b)


def moepp_of(case, **changes):
    zero, copy, constant = MIXTURES[case["mixture"]]
    settings = {
        "num_ffn_experts": 4,
        "num_zero_experts": zero,
        "num_copy_experts": copy,
        "num_constant_experts": constant,
        "balance_coeff": 0.1,
        **{name: value for name, value in case.items() if name in DECLARED},
    }
    return MoEPPConfig(**(settings | changes))


def reference_losses(logits, moepp, num_sequences, padded):
    """L_b and the z-loss of [T, E] logits, T ordered [position, sequence], without padding."""
    logits = logits.view(-1, num_sequences, logits.shape[-1])
    valid = ~padded.view(-1, num_sequences)
    groups = [logits[valid]]
    if moepp.balance_scope == "sequence":
        groups = [logits[valid[:, b], b] for b in range(num_sequences) if valid[:, b].any()]
    losses = []
    for tokens in groups:
        _, selected, scores = select_experts(tokens, moepp)
        losses.append(balance_loss(scores, selected, moepp))
    return torch.stack(losses).mean(), torch.logsumexp(logits[valid], dim=-1).square().mean()


def run_both(layer, hidden, previous, loss_scale=1.0, padding=None):
    """Forward and backward of both on [s, b, D] and [s, b, E], with [b, s] `padding`."""
    reference = reference_of(layer)
    moepp = layer.moepp
    if moepp.selection_bias:
        reference.selection_bias_E = layer.router.expert_bias
    num_tokens, num_sequences = hidden.shape[0] * hidden.shape[1], hidden.shape[1]
    padded = torch.zeros(num_tokens, dtype=torch.bool, device=hidden.device)
    if padding is not None:
        padded = padding.T.reshape(-1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(loss_scale))

    x = hidden.clone().requires_grad_()
    z = None if previous is None else previous.clone().requires_grad_()
    output, logits = layer(x, z, padding_mask=padding)
    weight_of_output = torch.randn_like(output)
    weight_of_logits = torch.randn_like(logits) * 0.1
    ((output * weight_of_output).sum() + (logits * weight_of_logits).sum()).backward()

    x_ref = hidden.float().view(num_tokens, -1).clone().requires_grad_()
    z_ref = None if previous is None else previous.view(num_tokens, -1).clone().requires_grad_()
    expected = reference(x_ref, z_ref, padded_T=None if padding is None else padded)
    loss = (expected.hidden_TD * weight_of_output.view_as(expected.hidden_TD)).sum()
    loss = loss + (expected.logits_TE * weight_of_logits.view_as(expected.logits_TE)).sum()
    balance, z_loss = reference_losses(expected.logits_TE, moepp, num_sequences, padded)
    tokens = (~padded).sum() if layer.config.calculate_per_token_loss else 1
    added = moepp.balance_coeff * balance + (layer.config.moe_z_loss_coeff or 0.0) * z_loss
    (loss + loss_scale * tokens * added).backward()

    run = Run(layer, reference, output, logits, expected, padded, balance, z_loss)
    run.input_grads["the input"] = (x.grad, x_ref.grad)
    if z is not None and layer.router.residual_weight is not None:
        run.input_grads["the previous logits"] = (z.grad, z_ref.grad)
    return run


def inputs(moepp, length=8, batch=3, device=None):
    hidden, previous = (torch.randn(length, batch, n) for n in (HIDDEN, moepp.num_experts))
    return hidden.to(device), previous.to(device)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_setting(case):
    check_setting(case)


def check_setting(case, device=None):
    moepp = moepp_of(case)
    layer = build_layer(
        moepp,
        has_residual=case["has_residual"],
        calculate_per_token_loss=case["calculate_per_token_loss"],
        dispatcher=case["dispatcher"],
        moe_z_loss_coeff=case["moe_z_loss_coeff"],
        device=device,
    )
    hidden, previous = inputs(moepp, device=device)
    run_both(layer, hidden, previous if case["has_residual"] else None).check()
    assert moepp.capacity_factor is None or layer.statistics.dropped > 0


@pytest.mark.parametrize("per_token_loss", [True, False])
@pytest.mark.parametrize("loss_scale", [0.25, 8.0])
def test_balance_loss_follows_the_loss_scale(per_token_loss, loss_scale):
    # The schedules set 1 / micro-batches or a gradient scaler's factor.
    moepp = MoEPPConfig(4, balance_coeff=0.5)
    layer = build_layer(moepp, calculate_per_token_loss=per_token_loss)
    run_both(layer, *inputs(moepp), loss_scale=loss_scale).check()


@pytest.mark.parametrize(
    ("topk", "normalization"),
    [(1, "none"), *itertools.product((3, 5), ("none", "selected", "nonzero"))],
)
def test_topk(topk, normalization):
    # 5 of 3 FFN and 4 others: more picks than there are FFN experts.
    moepp = MoEPPConfig(3, router_topk=topk, gate_normalization=normalization)
    run_both(build_layer(moepp), *inputs(moepp)).check()


def test_one_ffn_expert():
    moepp = MoEPPConfig(1, gate_normalization="nonzero")
    run_both(build_layer(moepp), *inputs(moepp)).check()


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
def test_one_token(dispatcher, normalization):
    moepp = MoEPPConfig(4, gate_normalization=normalization)
    layer = build_layer(moepp, dispatcher=dispatcher)
    run_both(layer, *inputs(moepp, length=1, batch=1)).check()


def forced(moepp, favoured, **changes):
    """A layer and previous logits with which every token selects only `favoured` experts."""
    layer = build_layer(moepp, **changes)
    with torch.no_grad():
        layer.router.weight.mul_(0.01)
        layer.router.residual_weight.copy_(torch.eye(moepp.num_experts))
    previous = torch.randn(8, 3, moepp.num_experts) * 0.1
    previous[..., favoured] += 4.0
    return layer, previous.to(layer.router.weight.device)


ONLY_ZERO = {"num_zero_experts": 2, "num_copy_experts": 0, "num_constant_experts": 0}
# Settings and the experts that all tokens select: one of any kind; zero experts, with others and
# without; no FFN expert.
FORCED = [
    *(({"router_topk": 1, "gate_normalization": "none"}, [expert]) for expert in (0, 3, 5, 6, 7)),
    *(
        (mixture | {"gate_normalization": normalization}, zero)
        for normalization in AXES["gate_normalization"]
        for mixture, zero in ((ONLY_ZERO, [4, 5]), ({"num_zero_experts": 2}, [7, 8]))
    ),
    ({"gate_normalization": "selected"}, [5, 6]),
]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(("changes", "favoured"), FORCED)
def test_all_tokens_to_the_same_experts(changes, favoured, dispatcher):
    moepp = MoEPPConfig(4, balance_coeff=0.1, **changes)
    layer, previous = forced(moepp, favoured, dispatcher=dispatcher)
    run = run_both(layer, torch.randn(8, 3, HIDDEN), previous)
    selections = [24 * (index in favoured) for index in range(moepp.num_experts)]
    assert run.expected.selected_TE.sum(dim=0).tolist() == selections
    run.check()
    for name, actual, _ in gradient_pairs(layer, run.reference):
        if name.startswith("experts") and int(name.split(".")[1]) not in favoured:
            assert torch.equal(actual, torch.zeros_like(actual)), name
    if favoured == list(range(moepp.num_experts))[moepp.columns(ZERO)]:
        assert torch.equal(run.hidden, torch.zeros_like(run.hidden))
        # The balance loss pulls the tokens back even though no output depends on the router.
        assert layer.router.weight.grad.abs().max() > 0


def test_rows_of_one_rank_are_sorted_once(monkeypatch):
    """megatron-core would sort rows by local expert, which the permutation has done already."""
    sorts = []
    original = token_dispatcher.sort_chunks_by_idxs

    def counted(*args, **kwargs):
        sorts.append(len(args[0]))
        return original(*args, **kwargs)

    monkeypatch.setattr(token_dispatcher, "sort_chunks_by_idxs", counted)
    layer = build_layer(MoEPPConfig(4))
    hidden = torch.randn(9, 3, HIDDEN)
    previous = torch.randn(9, 3, layer.moepp.num_experts)
    output, _ = layer(hidden, previous)
    assert sorts == []
    # Sorted once more, they are what they were.
    layer.token_dispatcher._is_single_rank = False
    again, _ = layer(hidden, previous)
    assert len(sorts) == 2
    assert sorts[0] > 0
    assert torch.equal(output, again)


def test_jitter_is_megatrons():
    moepp = MoEPPConfig(4)
    layer = build_layer(moepp, moe_input_jitter_eps=0.1)
    hidden, previous = inputs(moepp)
    torch.manual_seed(3)
    _, logits = layer(hidden, previous)
    torch.manual_seed(3)
    noise = torch.empty_like(hidden).uniform_(0.9, 1.1)
    expected = (hidden * noise) @ layer.router.weight.T
    expected = expected + previous @ layer.router.residual_weight.T
    assert_close(logits, expected, "logits")


def test_evaluation_computes_the_same_output():
    moepp = MoEPPConfig(4, capacity_factor=0.6)
    layer = build_layer(moepp)
    hidden, previous = inputs(moepp)
    trained, logits = layer(hidden, previous)
    layer.eval()
    with torch.no_grad():
        evaluated, logits_evaluated = layer(hidden, previous)
    assert torch.equal(trained, evaluated)
    assert torch.equal(logits, logits_evaluated)


@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
def test_bf16(normalization):
    moepp = MoEPPConfig(4, gate_normalization=normalization, expert_input_scale=2.0)
    layer = build_layer(moepp, params_dtype=torch.bfloat16, bf16=True)
    # fp32 parameters would make this test pass without testing anything.
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    hidden, previous = inputs(moepp)
    run = run_both(layer, hidden.bfloat16(), previous)
    assert run.hidden.dtype is torch.bfloat16
    assert run.logits.dtype is torch.float32
    # Weights and input are the same bf16 numbers on both sides and the router works in fp32.
    assert_close(run.logits.view(24, -1), run.expected.logits_TE, "logits")
    gates = layer.router(hidden.bfloat16(), previous).gates
    assert gates.dtype is torch.float32
    assert_close(gates, run.expected.gates_TE, "gates")
    # Seven roundings to bf16 (unit roundoff 2^-9) lie on the longest way of a value: scaled input
    # (exact for 2), fc1, SiLU, product with up and gate, fc2, combine, constants, input.
    assert_close(run.hidden.view(24, -1), run.expected.hidden_TD, "output", 7 * 2**-9)


def test_residual_needs_previous_logits():
    layer = build_layer(MoEPPConfig(4))
    with pytest.raises(AssertionError, match="gating residual but was given no logits"):
        layer(torch.randn(4, 1, HIDDEN))


def test_comparison_notices_a_wrong_gradient():
    moepp = MoEPPConfig(4)
    run = run_both(build_layer(moepp), *inputs(moepp))
    run.layer.zero_computation.constants.grad[0, 0] += 1e-3
    with pytest.raises(AssertionError, match="gradient of constants"):
        run.check()
