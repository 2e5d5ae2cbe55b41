"""Routing held at perfect balance."""

import pytest
import torch

from moepp_megatron.tools.bench.held_routing import (
    MARGIN,
    balanced_selection,
    balanced_shares,
    hold,
)
from moepp_megatron.tools.bench.shapes import SHAPES


@pytest.mark.parametrize("tau", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 37, 4096])
def test_every_expert_gets_its_share_and_no_token_an_expert_twice(tau, num_tokens):
    shares = balanced_shares(8, 4, tau)
    picks = balanced_selection(num_tokens, shares, 2, torch.Generator().manual_seed(1))
    assert picks.shape == (num_tokens, 2)
    assert (picks[:, 0] != picks[:, 1]).all()
    counts = torch.bincount(picks.flatten(), minlength=12)
    assert int(counts.sum()) == 2 * num_tokens
    assert ((counts - shares * 2 * num_tokens).abs() <= 1.0).all()
    ffn = int((picks < 8).sum())
    assert abs(ffn - SHAPES["0.6B"].experts.phi(tau) * 2 * num_tokens) <= 1.0


def test_held_router_selects_what_it_is_reported():
    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(12, 16) * 0.05)

        def gating(self, hidden):
            return hidden @ self.weight.T

    router = Router()
    shares = balanced_shares(8, 4, 0.5)
    picks = balanced_selection(64, shares, 2, torch.Generator().manual_seed(1))
    free = router.gating(torch.ones(64, 1, 16))
    hold(router, picks)
    logits = router.gating(torch.ones(64, 1, 16))
    assert (logits.flatten(0, 1).topk(2).indices.sort().values == picks.sort().values).all()
    added = (logits - free).flatten(0, 1)
    assert torch.allclose(added.sum(dim=1), torch.full((64,), 2 * MARGIN))


def test_paper_efficiency_follows_from_its_times():
    shape = SHAPES["0.6B"]
    assert shape.experts.phi(0.75) == pytest.approx(0.6)
    assert shape.paper_efficiency(0.75) == pytest.approx(535.3 / 427.6 * 0.6)
    assert SHAPES["7B"].paper_efficiency(0.1) is None
