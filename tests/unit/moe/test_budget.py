"""The budget of FFN experts per token: its schedule, its controllers, their state."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from moepp_megatron.features.budget.part import BudgetPart
from moepp_megatron.moe.budget import Budget, BudgetController
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import count_margins
from moepp_megatron.moe.selection import select

CONFIG = MoEPPConfig(8, num_zero_experts=1, num_copy_experts=1, num_constant_experts=2)
SELECTIONS = 10_000


def counts(*ffn_shares):
    """[L, E] selections with these FFN shares, alike within each kind."""
    return torch.stack(
        [
            torch.tensor([share / 8] * 8 + [(1 - share) / 4] * 4, dtype=torch.float64) * SELECTIONS
            for share in ffn_shares
        ]
    )


def test_target_stays_and_then_moves_on_a_straight_line():
    budget = Budget(share=0.5, start_share=1.0, ramp_begin=2, ramp_steps=4)
    shares = [budget.share_at(step) for step in range(1, 10)]
    assert shares == [1.0, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5, 0.5]


def test_ramp_without_steps_is_a_jump():
    budget = Budget(share=0.5, start_share=1.0, ramp_begin=2)
    assert [budget.share_at(step) for step in range(1, 5)] == [1.0, 1.0, 0.5, 0.5]
    assert Budget(share=0.5).share_at(1) == 0.5


def test_start_at_all_ffn_experts_has_a_finite_tau():
    controller = BudgetController(Budget(share=0.5, start_share=1.0, ramp_steps=10), CONFIG, 1)
    assert controller.taus(1) == [100.0]
    assert controller.taus(11) == pytest.approx([0.5])


def simulate_tau(controller, offset, steps):
    """Shares of a layer whose log odds follow tau with a delay, `offset` away from balance."""
    odds, shares = math.log(8 / 4), []
    for step in steps:
        (tau,) = controller.taus(step)
        odds += 0.05 * (math.log(tau * 8 / 4) + offset - odds)
        share = 1 / (1 + math.exp(-odds))
        controller.observe(counts(share), step)
        shares.append(share)
    return shares


def test_tau_controller_reaches_the_target_where_balance_alone_does_not():
    def last(controller):
        budget = Budget(share=0.5, controller=controller)  # type: ignore[arg-type]
        return simulate_tau(BudgetController(budget, CONFIG, 1), 0.8, range(1, 1001))[-1]

    assert abs(last("none") - 0.5) > 0.1
    # The sum over the past has a hundred steps to a tenth: after a thousand nothing is left of it.
    assert last("tau") == pytest.approx(0.5, rel=0.02)


def test_tau_that_is_at_its_end_does_not_wind_up():
    controller = BudgetController(Budget(share=0.5, controller="tau", decay=0.0), CONFIG, 1)
    controller.observe(counts(0.0), 1)
    past = controller.state()["past"]
    for step in range(2, 2001):
        controller.observe(counts(0.0), step)
    assert controller.taus(2001) == [100.0]
    assert controller.state()["past"] == past, "the past goes on adding up"
    controller.observe(counts(0.9), 2001)
    assert controller.taus(2002)[0] < 1.0


def test_bias_controller_reaches_the_target_and_balances():
    budget = Budget(share=0.5, controller="bias", gain=0.5, decay=0.0)
    controller = BudgetController(budget, CONFIG, 1)
    preference = torch.linspace(-0.5, 0.5, 12)
    bias = torch.zeros(12)
    for step in range(1, 801):
        shares = torch.softmax(preference + bias, dim=0)
        steps = controller.observe(shares[None] * SELECTIONS, step)
        bias += steps[0]
    assert shares[:8].sum() == pytest.approx(0.5, rel=0.02)
    assert shares[:8].max() / shares[:8].min() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(bias[8:], torch.zeros(4)), "only FFN experts have a bias"


def test_layers_are_held_apart_or_together():
    apart = BudgetController(Budget(share=0.5, controller="tau"), CONFIG, 2)
    together = BudgetController(Budget(share=0.5, controller="tau", per_layer=False), CONFIG, 2)
    for controller in (apart, together):
        controller.observe(counts(0.4, 0.6), 1)
    low, high = apart.taus(2)
    assert low > 0.5 > high
    assert together.taus(2) == pytest.approx([0.5, 0.5])


class Plant:
    """One layer whose tokens' logits are drawn anew in every step and drift by `pull` a step."""

    def __init__(self, config, tokens, spread, pull=0.0):
        self.config, self.tokens, self.spread, self.pull = config, tokens, spread, pull
        self.generator = torch.Generator().manual_seed(7)
        self.preference = torch.randn(config.num_experts, generator=self.generator)
        self.bias, self.steps = torch.zeros(config.num_experts), 0

    def step(self):
        """[1, E] selections and [1, B] margins."""
        noise = torch.randn(self.tokens, self.config.num_experts, generator=self.generator)
        logits = self.spread * (noise + self.preference)
        logits[:, : self.config.num_ffn_experts] += self.spread * self.pull * self.steps
        self.steps += 1
        selection = select(logits, self.bias, self.config, 1)
        assert selection.counts is not None
        return selection.counts, count_margins(logits, self.bias, self.config)[None]

    def run(self, budget, steps):
        """FFN share of each step, in units of the target."""
        controller, shares = BudgetController(budget, self.config, 1), []
        for step in range(1, steps + 1):
            selected, margins = self.step()
            ffn = selected[:, : self.config.num_ffn_experts].sum() / selected.sum()
            shares.append(float(ffn) / budget.share_at(step))
            moved = controller.observe(selected, step, margins)
            self.bias += moved[0]
        return shares


def scattered(plant, share):
    """Standard deviation of a step's measured share, in units of the target."""
    return math.sqrt((1 - share) / share / (plant.tokens * plant.config.router_topk))


LAYERS = {
    "8 of 12, top-2": MoEPPConfig(8),
    "4 of 6, top-1": MoEPPConfig(4, num_constant_experts=0, router_topk=1),
    "32 of 40, top-4": MoEPPConfig(32, num_constant_experts=6, router_topk=4),
    "sigmoid": MoEPPConfig(8, score_function="sigmoid"),
    "sqrtsoftplus": MoEPPConfig(8, score_function="sqrtsoftplus"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.15, 0.75])
def test_measured_bias_holds_any_layer_at_any_scale_of_scores(name, share):
    # Scores that differ by a thousandth, and scores that are near 0 or 1.
    for spread in (1e-3, 1.0, 5.0):
        plant = Plant(LAYERS[name], 1000, spread)
        shares = plant.run(Budget(share=share, controller="bias"), 60)
        # Half of the way in each step: after 20 a millionth is left of where it began. Then steps
        # scatter as their tokens do and the bias follows half of it, 20% more; six deviations.
        limit = 6 * 1.2 * scattered(plant, share)
        assert max(abs(s - 1) for s in shares[20:]) < limit, (name, spread)
        # The mean of 40 steps, by five deviations.
        assert abs(sum(shares[20:]) / 40 - 1) < 5 * scattered(plant, share) / 40**0.5


@pytest.mark.parametrize("response", [0.1, 0.5, 1.0])
def test_measured_bias_does_not_oscillate(response):
    plant = Plant(MoEPPConfig(8), 4000, 1.0)
    off = [s - 1 for s in plant.run(Budget(0.3, "bias", response=response), 150)[50:]]
    variance = sum(x * x for x in off) / len(off)
    # A response r to independent noise makes 2 / (2 - r) of its variance; twice that is too much.
    assert variance < 2 * 2 / (2 - response) * scattered(plant, 0.3) ** 2
    following = sum(a * b for a, b in zip(off, off[1:], strict=False)) / len(off)
    # And neighbours a correlation of -r / 2. An oscillation has -1.
    assert following / variance > -response / 2 - 0.3


def test_measured_bias_follows_routers_that_drift():
    plant = Plant(MoEPPConfig(8), 4000, 1.0, pull=-0.02)
    shares = plant.run(Budget(share=0.15, controller="bias"), 120)
    # An average alone is 1 / 0.7 of a step's drift behind, 3% of the share here. The mean of 100
    # steps scatters by less than a fifth of a step's 2.7%, for the bias makes up for what was off.
    assert sum(shares[20:]) / 100 == pytest.approx(1.0, abs=0.005)


def test_a_target_out_of_reach_leaves_no_drift_behind():
    config, budget = MoEPPConfig(8), Budget(share=0.4, controller="bias")
    plant, controller = Plant(config, 4000, 1.0), BudgetController(budget, config, 1)
    for step in range(1, 41):
        selected, margins = plant.step()
        if 20 <= step < 23:
            # No bias gives these tokens fewer FFN experts.
            margins = torch.zeros_like(margins)
            margins[:, 0] = selected.sum()
        moved = controller.observe(selected, step, margins)
        plant.bias += moved[0]
        if step == 23:
            drift = controller.state()["drift"][0]
    assert abs(drift) < 0.01, "three steps of 4 each"
    ffn = selected[:, :8].sum() / selected.sum()
    assert float(ffn) == pytest.approx(0.4, rel=7 * scattered(plant, 0.4))


def test_measured_bias_comes_from_all_ffn_experts_without_overshoot():
    config = MoEPPConfig(8)
    plant = Plant(config, 4000, 0.3)
    plant.bias[:8] = 1.25 / 8
    shares = [0.6 * s for s in plant.run(Budget(share=0.6, controller="bias"), 40)]
    assert shares[0] > 0.95
    assert min(shares) > 0.6 * (1 - 7 * scattered(plant, 0.6))
    assert shares[15] == pytest.approx(0.6, rel=7 * scattered(plant, 0.6))


def test_measured_bias_aims_at_the_next_step_of_a_ramp():
    budget = Budget(0.3, "bias", response=1.0, start_share=0.6, ramp_begin=10, ramp_steps=40)
    plant = Plant(MoEPPConfig(8), 4000, 1.0)
    shares = plant.run(budget, 60)
    # A step behind were 2% at the end of the ramp.
    assert sum(shares[10:50]) / 40 == pytest.approx(1.0, abs=0.01)


def test_measured_bias_is_held_together_or_apart():
    config = MoEPPConfig(8)
    few, many = Plant(config, 2000, 1.0), Plant(config, 2000, 1.0)
    few.bias[:8], many.bias[:8] = -0.3, 0.1
    pairs = [plant.step() for plant in (few, many)]
    selected, margins = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    together = BudgetController(Budget(0.4, "bias", per_layer=False), config, 2)
    apart = BudgetController(Budget(0.4, "bias"), config, 2)
    same = together.observe(selected, 1, margins)
    own = apart.observe(selected, 1, margins)
    assert own is not None
    assert torch.equal(same[0], same[1])
    assert own[0, :8].mean() > 0 > own[1, :8].mean()


def test_a_step_without_tokens_changes_nothing():
    controller = BudgetController(Budget(0.4, "bias"), CONFIG, 1)
    nothing = torch.zeros(1, 12, dtype=torch.float64)
    moved = controller.observe(nothing, 1, torch.zeros_like(Plant(CONFIG, 4, 1.0).step()[1]))
    assert not moved.any()


@pytest.mark.parametrize(("name", "measures"), [("bias", False), ("tau", False), ("bias", True)])
def test_restored_controller_continues_as_if_nothing_had_happened(name, measures):
    budget, plant = Budget(share=0.4, controller=name, gain=1.0), Plant(CONFIG, 500, 1.0)
    seen = [plant.step() for _ in range(8)]

    def observe(controller, steps):
        return [
            controller.observe(seen[step][0], step, seen[step][1] if measures else None)
            for step in steps
        ]

    whole, half = (BudgetController(budget, CONFIG, 1) for _ in range(2))
    expected = observe(whole, range(8))
    observe(half, range(4))
    resumed = BudgetController(budget, CONFIG, 1, json.loads(json.dumps(half.state())))
    for again, moved in zip(observe(resumed, range(4, 8)), expected[4:], strict=True):
        assert (moved is None and again is None) or torch.equal(moved, again)
    assert resumed.state() == whole.state()
    assert resumed.taus(9) == whole.taus(9)


def test_each_layer_gets_its_own_tau_and_its_own_part_of_the_biases():
    """A pipeline stage has layers from the middle of the model, in chunks that take turns."""
    taus = {}

    def layer(number):
        router = SimpleNamespace(
            expert_bias=torch.full((12,), 0.5), set_tau=lambda tau: taus.update({number: tau})
        )
        return SimpleNamespace(layer_number=number, router=router)

    layers = [layer(3), layer(5), layer(9)]
    numbers = [1, 3, 5, 7, 9]
    steps = torch.arange(5.0)[:, None].expand(5, 12)
    part = SimpleNamespace(
        _layers=layers,
        _routing=SimpleNamespace(layer_numbers=numbers),
        taus=lambda step: {number: number / 10 for number in numbers},
    )
    BudgetPart._add_to_biases(part, steps)
    BudgetPart.begin_step(part, 1, None)
    biases = {each.layer_number: each.router.expert_bias for each in layers}
    assert {number: set(bias.tolist()) for number, bias in biases.items()} == {
        3: {1.5},
        5: {2.5},
        9: {4.5},
    }
    assert taus == {3: 0.3, 5: 0.5, 9: 0.9}
