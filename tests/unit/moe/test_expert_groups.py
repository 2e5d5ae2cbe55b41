"""Group-limited routing: against all choices tried one by one, the reference and megatron-core."""

import itertools

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk

from moepp_megatron.experts import FFN_ONLY
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.margins import EDGES, count_margins
from moepp_megatron.moe.router_health import _margins
from moepp_megatron.moe.selection import select
from tests.unit.moe.builders import (
    DEFINED_SCORES,
    build_layer,
    of_kinds,
)
from tests.unit.moe.test_layer_against_reference import inputs, run_both

# K, groups, groups kept, then what else differs.
SETTINGS = [
    (2, 4, 1, {}),
    (3, 4, 2, {"score_function": "sigmoid", "gate_normalization": "selected"}),
    (4, 4, 2, {"score_function": "sqrtsoftplus"}),
    (4, 4, 2, {"score_function": "sigmoid", "selection_bias": True, "gate_scale": 2.5}),
    (3, 2, 1, {"gate_normalization": "nonzero", "selection_bias": True}),
    (4, 2, 1, {"logits_norm_std": 1.5, "capacity_factor": 0.8, "balance_scope": "sequence"}),
]


def config_of(topk, groups, kept, changes):
    return of_kinds(
        (8, 2, 2, 1),
        topk,
        num_groups=groups,
        group_topk=kept,
        **changes,
    )


def bias_of(config):
    """Large enough to change choices, different in every column."""
    return torch.linspace(-0.2, 0.3, config.num_experts) if config.selection_bias else None


def tried_out(logits, bias, config):
    """For each token the best K experts of all that the rule allows, found by trying all."""
    logits = logits.double()
    scores = DEFINED_SCORES[config.score_function](logits)
    if bias is not None:
        scores = scores + bias.double()
    size = config.num_ffn_experts // config.num_groups
    best = []
    for row in scores.tolist():
        in_group = [range(g * size, (g + 1) * size) for g in range(config.num_groups)]
        values = [
            max(
                sum(row[e] for e in some)
                for some in itertools.combinations(group, config.router_topk // config.group_topk)
            )
            for group in in_group
        ]
        kept = max(
            itertools.combinations(range(config.num_groups), config.group_topk),
            key=lambda groups, values=values: sum(values[g] for g in groups),
        )
        allowed = [e for g in kept for e in in_group[g]]
        allowed += range(config.num_ffn_experts, config.num_experts)
        best.append(
            set(
                max(
                    itertools.combinations(allowed, config.router_topk),
                    key=lambda experts, row=row: sum(row[e] for e in experts),
                )
            )
        )
    return best


@pytest.mark.parametrize(("topk", "groups", "kept", "changes"), SETTINGS)
def test_selection_is_the_best_that_is_allowed(topk, groups, kept, changes):
    config = config_of(topk, groups, kept, changes)
    bias = bias_of(config)
    logits = torch.randn(150, config.num_experts)
    made = select(logits, bias, config, 1)
    expected = tried_out(logits, bias, config)
    for token, experts in enumerate(expected):
        assert set(made.routing_map[token].nonzero().flatten().tolist()) == experts
    free = select(logits, bias, config_of(topk, 1, 1, changes), 1)
    assert not torch.equal(made.routing_map, free.routing_map), "no token was limited"
    assert (made.routing_map[:, 8:].sum(-1) < topk).any(), "no FFN expert was selected"
    # What groups do not touch: the scores of the balance loss, and the number of selections.
    assert made.score_sums is not None
    assert torch.equal(made.score_sums, free.score_sums)
    assert (made.routing_map.sum(-1) == topk).all()


@pytest.mark.parametrize(("topk", "groups", "kept", "changes"), SETTINGS)
def test_layer_is_the_reference(topk, groups, kept, changes):
    """Outputs and gradients of a whole layer; no balance loss, which groups do not enter."""
    config = config_of(topk, groups, kept, {"balance_coeff": 0.0} | changes)
    layer = build_layer(config)
    if config.selection_bias:
        layer.router.expert_bias.copy_(bias_of(config))
    run_both(layer, *inputs(config)).check()


@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (8, 8)])
@pytest.mark.parametrize("bias", [None, torch.linspace(-0.2, 0.3, 13)])
def test_all_groups_are_no_groups(groups, bias):
    logits = torch.randn(200, 13)
    config = config_of(3, *groups, {})
    free = select(logits, bias, config_of(3, 1, 1, {}), 1)
    for one, other in zip(select(logits, bias, config, 1), free, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("normalization", ["none", "selected", "nonzero"])
def test_token_of_zero_computation_experts_alone(normalization):
    """Scores of FFN experts of 0 neither become NaN nor keep a token from its experts."""
    config = config_of(4, 4, 2, {"gate_normalization": normalization})
    logits = torch.randn(50, config.num_experts)
    logits[:, 8:] += 300.0
    logits.requires_grad_()
    made = select(logits, None, config, 1)
    assert not made.routing_map[:, :8].any()
    assert (made.routing_map.sum(-1) == 4).all()
    (made.gates * torch.randn_like(made.gates)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    # One zero-computation expert fewer than selections: the FFN expert is of the best group, though
    # the softmax over all experts leaves all FFN experts a score of exactly 0.
    fewer = MoEPPConfig(8, num_constant_experts=1, router_topk=4, num_groups=4, group_topk=2)
    narrow = torch.cat([logits.detach()[:, :8], torch.full((50, 3), 300.0)], dim=-1)
    assert (torch.softmax(narrow, -1)[:, :8] == 0).all()
    made = select(narrow, None, fewer, 1)
    expected = tried_out(torch.cat([narrow[:, :8], torch.full((50, 3), 20.0)], -1), None, fewer)
    for token, experts in enumerate(expected):
        assert set(made.routing_map[token].nonzero().flatten().tolist()) == experts


def test_ties_go_to_the_first_group_and_the_first_expert():
    config = config_of(4, 4, 2, {})
    made = select(torch.zeros(3, config.num_experts), None, config, 1)
    assert made.routing_map.nonzero()[:, 1].view(3, 4).tolist() == [[0, 1, 2, 3]] * 3
    logits = torch.zeros(1, config.num_experts)
    logits[0, [6, 7]] = 1.0
    made = select(logits, None, config, 1)
    assert made.routing_map[0].nonzero().flatten().tolist() == [0, 1, 6, 7]


def test_ffn_experts_alone_are_selected_as_in_megatron_core():
    config = MoEPPConfig(
        16,
        **FFN_ONLY,
        router_topk=4,
        num_groups=8,
        group_topk=2,
        score_function="sigmoid",
    )
    logits = torch.randn(300, 16)
    _, theirs = group_limited_topk(torch.sigmoid(logits), 4, 300, 16, 8, 2)
    expected = torch.zeros(300, 16, dtype=torch.bool).scatter(1, theirs, True)
    assert torch.equal(select(logits, None, config, 1).routing_map, expected)


@pytest.mark.parametrize("raised", [-0.05, 0.0, 0.05])
def test_margins_tell_what_a_bias_would_do(raised):
    """The budget's controller reads off margins how many FFN experts a bias gives."""
    config = config_of(4, 4, 2, {"score_function": "sigmoid", "selection_bias": True})
    logits, bias = torch.randn(400, config.num_experts), bias_of(config)
    counts = count_margins(logits, bias, config)
    edge = min(EDGES, key=lambda end: abs(end - raised))
    up_to = int(counts[: EDGES.index(edge) + 1].sum())
    bias[:8] += edge
    made = select(logits, bias, config, None).routing_map
    # The bias is added in fp32 here and there: a margin within its rounding may fall to a side.
    assert abs(int(made[:, :8].sum()) - up_to) <= 2


def test_health_measures_the_margin_among_the_allowed():
    config = config_of(2, 4, 1, {})
    ranked = torch.rand(40, config.num_experts)
    margins = _margins(ranked, config)
    made = tried_out(ranked.log(), None, config)  # the softmax of logarithms, all but the scale
    for token, experts in enumerate(made):
        size = 2
        sums = [sum(sorted(ranked[token, g * size : g * size + 2].tolist())) for g in range(4)]
        best = sums.index(max(sums))
        allowed = {best * size, best * size + 1, *range(8, config.num_experts)}
        last = min(float(ranked[token, e]) for e in experts)
        following = max(float(ranked[token, e]) for e in allowed - experts)
        assert float(margins[token]) == pytest.approx(last - following, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, r"num_groups \(3\) must divide num_ffn_experts \(8\)"),
        ({"num_groups": 2, "group_topk": 3}, r"group_topk \(3\) must be at most num_groups"),
        ({"num_groups": 8, "group_topk": 3}, r"group_topk \(3\) must be at most router_topk"),
        (
            {"num_groups": 8, "group_topk": 1},
            r"group_topk \(1\) must leave at least router_topk \(2\) FFN experts, and 1 of 8 "
            r"groups have 1; use more",
        ),
    ],
)
def test_groups_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        MoEPPConfig(8, **changes)
