"""The MoE++ layer on a card against reference.py on the same card: outputs and every gradient."""

import pytest
import torch

from moepp_megatron.moe.config import MoEPPConfig
from tests.unit.moe.builders import FFN_HIDDEN, HIDDEN, build_layer, gradient_pairs
from tests.unit.moe.test_layer_against_reference import (
    CASES,
    DISPATCHERS,
    case_id,
    check_setting,
    forced,
    inputs,
    run_both,
)

pytestmark = pytest.mark.gpu

FUSED = pytest.mark.parametrize("fused", [False, "auto"])
ALL_TO_ALL = pytest.mark.parametrize("dispatcher", ["alltoall", "alltoall_dedup"])
FOUR = {"num_ffn_experts": 4, "balance_coeff": 0.1}
BF16 = {"params_dtype": torch.bfloat16, "bf16": True}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_setting(card, case):
    """fp32, no TF32 (torch's default): `assert_close`'s 1e-5 holds for any order of the sums."""
    check_setting(case, card)


@FUSED
@ALL_TO_ALL
@pytest.mark.parametrize("expert", [0, 3, 5, 6, 7])
def test_all_tokens_to_one_expert(card, expert, dispatcher, fused):
    moepp = MoEPPConfig(router_topk=1, fused=fused, **FOUR)
    layer, previous = forced(moepp, [expert], dispatcher=dispatcher, device=card)
    run = run_both(layer, torch.randn(8, 3, HIDDEN).to(card), previous)
    assert run.expected.selected_TE[:, expert].all()
    run.check()


@FUSED
@ALL_TO_ALL
def test_no_ffn_token(card, dispatcher, fused):
    moepp = MoEPPConfig(fused=fused, **FOUR)
    layer, previous = forced(moepp, [5, 6], dispatcher=dispatcher, device=card)
    run = run_both(layer, torch.randn(8, 3, HIDDEN).to(card), previous)
    assert not run.expected.selected_TE[:, :4].any()
    run.check()
    for name, actual, _ in gradient_pairs(layer, run.reference):
        if name.startswith("experts"):
            assert torch.equal(actual, torch.zeros_like(actual)), name


@FUSED
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_one_token(card, dispatcher, fused):
    moepp = MoEPPConfig(num_ffn_experts=4, fused=fused)
    layer = build_layer(moepp, dispatcher=dispatcher, device=card)
    run_both(layer, *inputs(moepp, length=1, batch=1, device=card)).check()


@FUSED
@ALL_TO_ALL
def test_experts_of_very_different_sizes(card, dispatcher, fused):
    """0, 1, 15, 16, 17 and 61 rows: around what products and kernels take at once."""
    counts = [0, 1, 15, 16, 17, 61]
    moepp = MoEPPConfig(num_ffn_experts=6, router_topk=1, balance_coeff=0.1, fused=fused)
    layer, _ = forced(moepp, [0], dispatcher=dispatcher, device=card)
    expert = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))
    expert = expert[torch.randperm(len(expert))]
    previous = torch.randn(110, 1, moepp.num_experts) * 0.1
    previous.view(110, -1).scatter_add_(1, expert[:, None], torch.full((110, 1), 4.0))
    run = run_both(layer, torch.randn(110, 1, HIDDEN).to(card), previous.to(card))
    assert run.expected.selected_TE.sum(dim=0).tolist() == [*counts, 0, 0, 0, 0]
    run.check()


def relative_l2(actual, expected):
    """0 where both are 0, as gradients of an expert without a row are."""
    difference, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return (difference / size.clamp_min(1e-30)).item()


def check_bf16(run):
    """All in bf16 but router, gates and sums, which are fp32; the reference is fp32 throughout.

    A value is rounded to bf16 seven times on its way forward (unit roundoff 2^-9) and as often on
    its way back; a gradient of a weight multiplies results of both. Errors of many numbers add up
    as their squares do: sqrt(14) 2^-9 = 2^-7.1, and twice that is allowed.
    """
    allowed = 2 * 14**0.5 * 2**-9
    width = run.expected.logits_TE.shape[-1]
    assert run.hidden.dtype is torch.bfloat16
    assert run.logits.dtype is torch.float32
    errors = {
        "output": relative_l2(run.hidden.view(-1, HIDDEN), run.expected.hidden_TD),
        "logits": relative_l2(run.logits.view(-1, width), run.expected.logits_TE),
    }
    for name, (actual, expected) in run.input_grads.items():
        errors[name] = relative_l2(actual.view(expected.shape), expected)
    for name, actual, expected in gradient_pairs(run.layer, run.reference):
        errors[name] = relative_l2(actual, expected)
    assert max(errors.values()) < allowed, errors


@FUSED
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_bf16(card, dispatcher, fused):
    moepp = MoEPPConfig(fused=fused, **FOUR)
    layer = build_layer(moepp, dispatcher=dispatcher, device=card, **BF16)
    hidden, previous = inputs(moepp, length=32, batch=4, device=card)
    check_bf16(run_both(layer, hidden.bfloat16(), previous))


@FUSED
@ALL_TO_ALL
@pytest.mark.parametrize("experts", [[3, 6], [5, 6]])
def test_bf16_with_experts_without_rows(card, experts, dispatcher, fused):
    moepp = MoEPPConfig(fused=fused, **FOUR)
    layer, previous = forced(moepp, experts, dispatcher=dispatcher, device=card, **BF16)
    run = run_both(layer, torch.randn(8, 3, HIDDEN).to(card).bfloat16(), previous)
    assert run.expected.selected_TE[:, experts].all()
    check_bf16(run)


@FUSED
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_grouped_experts_of_transformer_engine(card, transformer_engine, dispatcher, fused):
    """Its grouped GEMM and its fused permutation."""
    moepp = MoEPPConfig(fused=fused, **FOUR)
    layer = build_layer(
        moepp,
        dispatcher=dispatcher,
        **BF16,
        device=card,
        use_transformer_engine=True,
        moe_grouped_gemm=True,
        moe_permute_fusion=True,
        # Its modules are built where they run.
        use_cpu_initialization=False,
    )
    assert type(layer.experts).__name__ == "TEGroupedMLP"
    assert layer.experts.linear_fc1.weight0.shape == (2 * FFN_HIDDEN, HIDDEN)
    hidden, previous = inputs(moepp, length=32, batch=4, device=card)
    check_bf16(run_both(layer, hidden.bfloat16(), previous))
