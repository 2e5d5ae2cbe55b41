"""The balance loss: its least value, its gradient, how it joins the loss.

`test_layer_against_reference.py` has its value in layers, `test_reference.py` by hand.
"""

import dataclasses
import itertools

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moepp_megatron.moe.balance import SelectedFractions, attached_loss
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import balance_loss
from tests.unit.moe.builders import DEFINED_SCORES, HIDDEN, build_layer, of_kinds


def test_grouped_by_hand():
    # 2 FFN and 2 copy experts, K = 2, w = 2. f_F = 3/2, f_Z = 1/2, P_F = 0.65, P_Z = 0.35.
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.3, 0.2, 0.3, 0.2]])
    selected = torch.tensor([[True, True, False, False], [True, False, True, False]])
    config = of_kinds((2, 0, 2, 0), 2, tau=0.5, balance_loss="grouped")
    # ZEDA's formula as it is published: (N + w N_Z) / K (f P / N + f_Z P_Z / (w N_Z)).
    expected = pytest.approx(6 / 2 * (1.5 * 0.65 / 2 + 0.5 * 0.35 / 4), rel=1e-6)
    assert balance_loss(scores, selected, config).item() == expected
    # Which expert of a group is selected makes no difference.
    moved = selected[:, [1, 0, 3, 2]]
    assert balance_loss(scores, moved, config).item() == expected


def test_global_fractions_are_the_mean_over_the_steps_micro_batches():
    seen = SelectedFractions()
    first, second = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    assert seen.add(first, 2, None).tolist() == [[1.0, 0.0]]
    assert seen.add(second, 2, None).tolist() == [[0.75, 0.25]]
    seen.reset()
    assert seen.add(second, 2, None).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("score_function", DEFINED_SCORES)
@pytest.mark.parametrize(
    ("scope", "kind"),
    [("microbatch", "heterogeneous"), ("sequence", "heterogeneous"), ("sequence", "grouped")],
)
def test_router_gradient_against_finite_differences(score_function, scope, kind):
    # The only gradient that a sum over no output leaves is the balance loss's own.
    config = MoEPPConfig(
        3,
        tau=0.3,
        balance_coeff=1.0,
        score_function=score_function,
        balance_scope=scope,
        balance_loss=kind,
    )
    router = build_layer(config, calculate_per_token_loss=False).router
    logits = torch.randn(5, 2, config.num_experts, dtype=torch.float64, requires_grad=True)
    router.balance_weights = router.balance_weights.double()

    def recorded(z):
        router.statistics.reset()
        gates, _ = router.routing(z)
        return gates, router.statistics.balance_loss

    gates, _ = recorded(logits)
    (gates * 0).sum().backward()
    step = 1e-6
    for index in itertools.product(*map(range, logits.shape)):
        moved = torch.zeros_like(logits)
        moved[index] = step
        with torch.no_grad():
            upper, lower = logits + moved, logits - moved
        difference = (recorded(upper)[1] - recorded(lower)[1]) / (2 * step)
        # Central differences in fp64: truncation 1e-12, cancellation 1e-16 / 1e-6 = 1e-10.
        assert logits.grad[index].item() == pytest.approx(difference.item(), abs=1e-9)


@pytest.mark.parametrize("types", ["none", "aux_loss"])
def test_global_scope_needs_counts_that_begin_anew(types):
    config = MoEPPConfig(3, balance_scope="global")
    changes = {"moe_router_load_balancing_type": types}
    with pytest.raises(ValueError, match=r"moe_router_load_balancing_type \(.*global_aux_loss"):
        build_layer(config, **changes)
    for scope in ("microbatch", "sequence"):
        build_layer(dataclasses.replace(config, balance_scope=scope), **changes)


def test_global_counts_begin_anew_in_every_step():
    config = MoEPPConfig(3, balance_scope="global", balance_coeff=0.1)
    layer = build_layer(config)
    steps = torch.randn(2, 2, 4, 2, HIDDEN)

    def losses(step):
        layer.statistics.reset()
        for hidden in step:
            layer(hidden, torch.zeros(4, 2, config.num_experts))
        # What megatron-core's `finalize_model_grads` ends with.
        reset_model_temporary_tensors(layer.config, [layer])
        return layer.statistics.balance_loss.item()

    first, second = losses(steps[0]), losses(steps[1])
    assert losses(steps[1]) == second
    assert losses(steps[0]) == first != second


def loss_of_allocation(counts, config):
    """L_b where counts[i] of all tokens select expert i, with probabilities in proportion."""
    total = sum(counts)
    probabilities = torch.tensor(counts, dtype=torch.float64) / total
    scores = probabilities.expand(total, -1)
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    selected = torch.nn.functional.one_hot(chosen, len(counts)).bool()
    return balance_loss(scores, selected, config).item()


def test_least_loss_is_at_the_ffn_share_phi():
    # Selections follow the probabilities, f_i = K P_i. Among all ways to give 7 tokens to 5
    # experts, the least sum eta_i f_i P_i gives each zero-computation expert 1 / tau FFN loads.
    config = of_kinds((3, 1, 1, 0), 1, tau=0.5)
    allocations = [
        (*counts, 7 - sum(counts))
        for counts in itertools.product(range(8), repeat=4)
        if sum(counts) <= 7
    ]
    losses = {counts: loss_of_allocation(counts, config) for counts in allocations}
    best = min(losses, key=losses.__getitem__)
    assert best == (1, 1, 1, 2, 2)
    assert sum(best[:3]) / 7 == pytest.approx(config.ffn_share)
    runner_up = sorted(losses.values())[1]
    assert losses[best] < runner_up - 1e-3


@pytest.mark.parametrize(("per_token_loss", "factor"), [(True, 30.0), (False, 1.0)])
def test_attached_loss_keeps_the_activation_and_gets_a_gradient(per_token_loss, factor):
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.5))
    activation = torch.randn(3, 4, requires_grad=True)
    loss = torch.tensor(2.0, requires_grad=True)
    attached = MoEAuxLossAutoScaler.apply(activation, attached_loss(loss, 1.0, 30, per_token_loss))
    assert torch.equal(attached, activation)
    (attached * 7).sum().backward()
    assert torch.equal(activation.grad, torch.full_like(activation, 7))
    assert loss.grad.item() == 0.5 * factor


def test_no_balance_loss_with_coefficient_zero():
    layer = build_layer(MoEPPConfig(4, balance_coeff=0.0))
    layer(torch.randn(4, 2, 16), torch.randn(4, 2, 8))
    assert layer.statistics.balance_loss is None
