"""Heterogeneous capacities: limits by hand, who stays, agreement with the reference."""

import pytest
import torch

from moepp_megatron.moe.capacity import capacities, within_capacity
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.reference import select_experts
from moepp_megatron.moe.reference import within_capacity as reference_within_capacity
from tests.unit.moe.builders import of_kinds


@pytest.mark.parametrize(
    ("ffn", "zero_computation", "tau", "gamma", "topk", "tokens", "expected"),
    [
        # (F, Z, tau): tau F + Z units share the K T selections.
        (8, 4, 0.75, 1.0, 2, 100, (15, 20)),
        (8, 4, 0.75, 1.1, 2, 100, (17, 22)),  # 16.5 and 22
        (4, 4, 0.5, 1.0, 1, 6, (1, 1)),  # 0.5 and 1
        (4, 4, 0.5, 1.0, 1, 7, (1, 2)),  # 0.58 and 1.17
        (2, 0, 0.25, 1.0, 2, 8, (8, 32)),  # no zero-computation expert: tau cancels for FFNs
        (16, 4, 0.1, 1.1, 2, 2048, (81, 805)),  # 80.457 and 804.571
        (8, 4, 0.7, 1.1, 2, 96, (16, 22)),  # exactly 15.4 and 22
        (3, 1, 0.3, 1.9, 1, 10, (3, 10)),  # exactly 3 and 10
    ],
)
def test_limits(ffn, zero_computation, tau, gamma, topk, tokens, expected):
    config = of_kinds(
        (ffn, zero_computation, 0, 0),
        topk,
        tau=tau,
        capacity_factor=gamma,
    )
    limits = capacities(config, tokens)
    assert limits[:ffn] == [expected[0]] * ffn
    assert limits[ffn:] == [expected[1]] * zero_computation


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
def test_keeps_what_the_reference_keeps(seed, normalization):
    generator = torch.Generator().manual_seed(seed)
    config = MoEPPConfig(
        3,
        router_topk=2,
        capacity_factor=0.2 + 0.05 * seed,
        gate_normalization=normalization,
    )
    # Few distinct logits, so that many gates tie.
    logits = torch.randint(3, (29, config.num_experts), generator=generator).float()
    gates, selected, _ = select_experts(logits, config)
    kept = within_capacity(gates, selected, config, None)
    assert torch.equal(kept, reference_within_capacity(gates, selected, config))
    counts = kept.sum(dim=0)
    limits = torch.tensor(capacities(config, 29))
    assert torch.equal(counts, torch.minimum(selected.sum(dim=0), limits))
    assert not (kept & ~selected).any()


def test_a_selected_gate_of_zero_comes_before_what_was_not_selected():
    # "nonzero" gives zero experts the gate 0: their selections still fill their capacity.
    config = of_kinds(
        (1, 1, 0, 0),
        1,
        tau=1.0,
        capacity_factor=0.5,
    )
    selected = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    kept = within_capacity(torch.zeros(4, 2), selected, config, None)
    assert kept.tolist() == [[True, False], [False, False], [False, True], [False, False]]
