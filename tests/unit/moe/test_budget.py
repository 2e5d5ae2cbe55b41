"""The budget of FFN experts per token: its schedule, its two controllers, their state."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moepp_megatron.moe.budget import Budget, BudgetController
from moepp_megatron.moe.config import MoEPPConfig

CONFIG = MoEPPConfig(8, num_zero_experts=1, num_copy_experts=1, num_constant_experts=2)
SELECTIONS = 10_000


def counts(*ffn_shares: float) -> torch.Tensor:
    """[L, E] selections with these FFN shares, alike within each kind."""
    return torch.stack(
        [
            torch.tensor([share / 8] * 8 + [(1 - share) / 4] * 4, dtype=torch.float64) * SELECTIONS
            for share in ffn_shares
        ]
    )


@pytest.mark.parametrize("tau", [0.1, 0.75, 4.0])
def test_tau_for_a_share_is_phi_turned_around(tau: float) -> None:
    config = MoEPPConfig(8, tau=tau)
    # The rounding of a logarithm and an exponential.
    assert config.tau_for(config.ffn_share) == pytest.approx(tau, rel=1e-12)


def test_target_stays_and_then_moves_on_a_straight_line() -> None:
    budget = Budget(share=0.5, start_share=1.0, ramp_begin=2, ramp_steps=4)
    shares = [budget.share_at(step) for step in range(1, 10)]
    assert shares == [1.0, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]


def test_ramp_without_steps_is_a_jump() -> None:
    budget = Budget(share=0.5, start_share=1.0, ramp_begin=2)
    assert [budget.share_at(step) for step in range(1, 5)] == [1.0, 1.0, 0.5, 0.5]
    assert Budget(share=0.5).share_at(1) == 0.5


def test_start_at_all_ffn_experts_has_a_finite_tau() -> None:
    controller = BudgetController(Budget(share=0.5, start_share=1.0, ramp_steps=10), CONFIG, 1)
    assert controller.taus(1) == [100.0]
    assert controller.taus(11) == pytest.approx([0.5])


def simulate_tau(controller: BudgetController, offset: float, steps: range) -> list[float]:
    """Shares of a layer whose log odds follow tau with a delay, `offset` away from balance."""
    odds, shares = math.log(8 / 4), []
    for step in steps:
        (tau,) = controller.taus(step)
        odds += 0.05 * (math.log(tau * 8 / 4) + offset - odds)
        share = 1 / (1 + math.exp(-odds))
        controller.observe(counts(share), step)
        shares.append(share)
    return shares


def test_tau_controller_reaches_the_target_where_balance_alone_does_not() -> None:
    def last(controller: str) -> float:
        budget = Budget(share=0.5, controller=controller)  # type: ignore[arg-type]
        return simulate_tau(BudgetController(budget, CONFIG, 1), 0.8, range(1, 1001))[-1]

    assert abs(last("none") - 0.5) > 0.1
    # The sum over the past has a hundred steps to a tenth: after a thousand nothing is left of it.
    assert last("tau") == pytest.approx(0.5, rel=0.02)


def test_tau_that_is_at_its_end_does_not_wind_up() -> None:
    controller = BudgetController(Budget(share=0.5, controller="tau", decay=0.0), CONFIG, 1)
    controller.observe(counts(0.0), 1)
    past = controller.state()["past"]
    for step in range(2, 2001):
        controller.observe(counts(0.0), step)
    assert controller.taus(2001) == [100.0]
    assert controller.state()["past"] == past, "the past goes on adding up"
    controller.observe(counts(0.9), 2001)
    assert controller.taus(2002)[0] < 1.0


def test_bias_controller_reaches_the_target_and_balances() -> None:
    budget = Budget(share=0.5, controller="bias", gain=0.5, decay=0.0)
    controller = BudgetController(budget, CONFIG, 1)
    preference = torch.linspace(-0.5, 0.5, 12)
    bias = torch.zeros(12)
    for step in range(1, 801):
        shares = torch.softmax(preference + bias, dim=0)
        steps = controller.observe(shares[None] * SELECTIONS, step)
        assert steps is not None
        bias += steps[0]
    assert shares[:8].sum() == pytest.approx(0.5, rel=0.02)
    assert shares[:8].max() / shares[:8].min() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(bias[8:], torch.zeros(4)), "only FFN experts have a bias"


def test_layers_are_held_apart_or_together() -> None:
    apart = BudgetController(Budget(share=0.5, controller="tau"), CONFIG, 2)
    together = BudgetController(Budget(share=0.5, controller="tau", per_layer=False), CONFIG, 2)
    for controller in (apart, together):
        controller.observe(counts(0.4, 0.6), 1)
    low, high = apart.taus(2)
    assert low > 0.5 > high
    assert together.taus(2) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("controller", ["bias", "tau"])
def test_restored_controller_goes_on_as_if_nothing_had_happened(controller: str) -> None:
    budget = Budget(share=0.4, controller=controller)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    seen = [torch.randint(1, 100, (2, 12), generator=generator).double() for _ in range(8)]
    whole = BudgetController(budget, CONFIG, 2)
    for step, selected in enumerate(seen, 1):
        last = whole.observe(selected, step)
    half = BudgetController(budget, CONFIG, 2)
    for step, selected in enumerate(seen[:4], 1):
        half.observe(selected, step)
    resumed = BudgetController(budget, CONFIG, 2, json.loads(json.dumps(half.state())))
    for step, selected in enumerate(seen[4:], 5):
        again = resumed.observe(selected, step)
    assert resumed.state() == whole.state()
    assert resumed.taus(9) == whole.taus(9)
    assert (last is None and again is None) or torch.equal(last, again)
