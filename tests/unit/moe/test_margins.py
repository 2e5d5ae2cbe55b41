"""Margins of selections: which bias gives how many FFN experts, counted in bins."""

import pytest
import torch

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import EDGES, count_margins, quantile
from moepp_megatron.moe.selection import select

CONFIGS = {
    "top-2": MoEPPConfig(8),
    "top-1": MoEPPConfig(4, router_topk=1),
    "sigmoid": MoEPPConfig(8, score_function="sigmoid", router_topk=3),
    "sqrtsoftplus": MoEPPConfig(8, score_function="sqrtsoftplus", router_topk=3),
    "more selections than zero-computation experts": MoEPPConfig(
        8, num_constant_experts=0, router_topk=4
    ),
    "more selections than FFN experts": MoEPPConfig(2, router_topk=3),
}


def drawn(config, tokens=500):
    """Logits and a bias."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(tokens, config.num_experts, generator=generator)
    return logits, 0.1 * torch.randn(config.num_experts, generator=generator)


def selections(logits, bias, config):
    """Of FFN experts."""
    return float(select(logits, bias, config, None).routing_map[:, : config.num_ffn_experts].sum())


@pytest.mark.parametrize("name", CONFIGS)
def test_margins_up_to_a_rise_are_the_selections_under_it(name):
    config = CONFIGS[name]
    logits, bias = drawn(config)
    margins = count_margins(logits, bias, config)
    for place in (0, 60, 80, 90, EDGES.index(0.0), 110, 130, 150, len(EDGES) - 1):
        raised = bias.clone()
        raised[: config.num_ffn_experts] += EDGES[place]
        # At an edge itself rounding decides, but no margin lies on one; at 0 nothing is rounded.
        assert float(margins[: place + 1].sum()) == selections(logits, raised, config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_quantile_is_the_rise_that_gives_a_number_of_selections(name, part):
    config = CONFIGS[name]
    logits, bias = drawn(config, 2000)
    lowest = max(0, config.router_topk - config.num_zero_computation_experts)
    highest = min(config.router_topk, config.num_ffn_experts)
    wanted = len(logits) * (lowest + part * (highest - lowest))
    bias[: config.num_ffn_experts] += quantile(count_margins(logits, bias, config).tolist(), wanted)
    # Bins are a fifth as wide as they are far away; inside they count as evenly filled.
    assert selections(logits, bias, config) == pytest.approx(wanted, rel=0.03)


def test_padding_has_no_margins():
    config = MoEPPConfig(8)
    logits, bias = drawn(config)
    padded = torch.arange(len(logits)) % 3 == 0
    counts = count_margins(logits.masked_fill(padded.unsqueeze(-1), 0.0), bias, config, padded)
    assert torch.equal(counts, count_margins(logits[~padded], bias, config))


def test_quantile_ends_at_the_edges():
    counts = [0.0] * (len(EDGES) + 1)
    assert quantile(counts, 1.0) == EDGES[-1]
    counts[0] = 10.0
    assert quantile(counts, 5.0) == EDGES[0]
    assert quantile(counts, 11.0) == EDGES[-1]
