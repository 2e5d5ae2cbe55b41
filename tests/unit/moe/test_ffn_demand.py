"""Demands for FFN experts: against the reference with gradients, and tags through recomputation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import MoEPPLayer, moe_statistics
from moepp_megatron.moe.selection import select
from moepp_megatron.moe.token_tags import TokenTags, cells, forced_tokens
from tests.unit.moe.builders import (
    HIDDEN,
    SEQUENCE,
    VOCAB,
    assert_close,
    build_layer,
    build_model,
    gradient_pairs,
    randomize,
    reference_of,
    token_losses,
)

LENGTH, BATCH = 8, 3
SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "alltoall"),
    ({"score_function": "sigmoid", "gate_normalization": "selected"}, "allgather"),
    ({"gate_normalization": "nonzero", "router_topk": 3, "expert_input_scale": 2.0}, "alltoall"),
    ({"selection_bias": True, "gate_scale": 2.0, "balance_scope": "sequence"}, "alltoall"),
    ({"logits_norm_std": 1.5, "two_layer_gate": True}, "alltoall_dedup"),
]


def tags_of(forced: Tensor) -> Tensor:
    """[s, b] tags that force these tokens, all in cell 0."""
    return forced.view(LENGTH, BATCH).long()


@pytest.mark.parametrize(("changes", "dispatcher"), SETTINGS)
@pytest.mark.parametrize("demand", ["one", "one of some", "all", 0.4])
def test_layer_is_the_reference(
    changes: dict[str, Any], dispatcher: str, demand: str | float
) -> None:
    """Outputs and gradients; no balance loss, which the next test looks at."""
    moepp = MoEPPConfig(
        num_ffn_experts=4,
        num_zero_experts=2,
        num_copy_experts=2,
        **({"balance_coeff": 0.0} | changes),
    )
    layer = build_layer(moepp, dispatcher=dispatcher)
    if moepp.selection_bias:
        layer.router.expert_bias.copy_(torch.linspace(-0.4, 0.4, moepp.num_experts))
    forced = torch.rand(LENGTH * BATCH) < 0.5 if demand == "one of some" else None
    name: Any = demand[:3].strip() if isinstance(demand, str) else demand
    layer.router.set_ffn_demand(name)
    reference = reference_of(layer)
    reference.ffn_demand = name
    reference.selection_bias_E = layer.router.expert_bias

    hidden = torch.randn(LENGTH, BATCH, HIDDEN, requires_grad=True)
    previous = torch.randn(LENGTH, BATCH, moepp.num_experts, requires_grad=True)
    output, logits = layer(hidden, previous, tags=None if forced is None else tags_of(forced))
    weights = torch.randn_like(output)
    ((output * weights).sum() + logits.sum()).backward()

    x = hidden.detach().view(-1, HIDDEN).clone().requires_grad_()
    z = previous.detach().view(len(x), -1).clone().requires_grad_()
    expected = reference(x, z, forced)
    ((expected.hidden_TD * weights.view_as(x)).sum() + expected.logits_TE.sum()).backward()
    assert_close(output.view_as(x), expected.hidden_TD, "output")
    assert_close(hidden.grad.view_as(x), x.grad, "gradient of the input")
    assert_close(previous.grad.view_as(z), z.grad, "gradient of the previous logits")
    for name, actual, wanted in gradient_pairs(layer, reference):
        assert_close(actual, wanted, f"gradient of {name}")

    made = expected.selected_TE.sum(dim=0)
    assert layer.statistics.selected.tolist() == made.tolist()
    own = build_layer(moepp, dispatcher=dispatcher)
    own.load_state_dict(layer.state_dict())
    own(hidden.detach(), previous.detach())
    assert layer.statistics.wanted_counts().tolist() == own.statistics.selected.tolist()
    assert made.tolist() != own.statistics.selected.tolist(), "nothing was demanded in vain"


@pytest.mark.parametrize("demand", ["one", "all", 2.0])
def test_the_balance_loss_is_of_the_routers_own_choice(demand: str) -> None:
    moepp = MoEPPConfig(num_ffn_experts=4, balance_coeff=0.5)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN)
    previous = torch.randn(LENGTH, BATCH, moepp.num_experts)
    free = build_layer(moepp)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    losses, gradients = [], []
    for name in ("none", demand):
        layer = build_layer(moepp)
        layer.load_state_dict(free.state_dict())
        layer.router.set_ffn_demand(name)
        z = previous.clone().requires_grad_()
        output, _ = layer(hidden, z)
        (output * 0).sum().backward()  # the balance loss alone reaches the logits
        losses.append(layer.statistics.balance_loss)
        gradients.append(z.grad)
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("changes", [changes for changes, _ in SETTINGS])
def test_a_number_leads_from_all_to_none(changes: dict[str, Any]) -> None:
    """The more logits are lowered, the fewer zero-computation experts; the ends are the others."""
    config = MoEPPConfig(num_ffn_experts=4, num_zero_experts=2, num_copy_experts=2, **changes)
    logits = torch.randn(200, config.num_experts)
    bias = torch.linspace(-0.4, 0.4, config.num_experts) if config.selection_bias else None
    demands = ["none", 0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 50.0, "all"]
    made = [select(logits, bias, config, None, demand) for demand in demands]
    for one, other in (made[:2], made[-2:]):
        assert torch.equal(one.routing_map, other.routing_map)
        assert_close(one.gates, other.gates, "gates")
    counts = [int(found.routing_map[:, 4:].sum()) for found in made]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 4


def test_one_is_the_best_choice_that_has_an_ffn_expert() -> None:
    config = MoEPPConfig(num_ffn_experts=3, num_constant_experts=3, router_topk=3)
    logits = torch.randn(200, config.num_experts)
    made = select(logits, None, config, None, "one").routing_map
    sets = [
        chosen
        for chosen in itertools.combinations(range(config.num_experts), 3)
        if min(chosen) < config.num_ffn_experts
    ]
    scores = torch.softmax(logits, dim=-1)
    best = torch.stack([scores[:, list(chosen)].sum(dim=-1) for chosen in sets]).argmax(dim=0)
    for token, index in enumerate(best.tolist()):
        assert tuple(made[token].nonzero().flatten().tolist()) == sets[index]


def test_a_demand_that_is_met_changes_no_bit() -> None:
    config = MoEPPConfig(num_ffn_experts=4, gate_normalization="selected", router_topk=3)
    logits = torch.randn(300, config.num_experts)
    free = select(logits, None, config, 1)
    demanded = select(logits, None, config, 1, "one")
    has_ffn = free.routing_map[:, :4].any(dim=-1)
    assert 0 < has_ffn.sum() < 300
    assert torch.equal(free.gates[has_ffn], demanded.gates[has_ffn])
    assert torch.equal(free.counts, demanded.counts)
    nobody = select(logits, None, config, 1, "one", torch.zeros(300, dtype=torch.bool))
    assert torch.equal(free.gates, nobody.gates)


def test_all_is_a_router_without_other_experts() -> None:
    """Even where the router wants nothing but zero-computation experts."""
    config = MoEPPConfig(num_ffn_experts=4)
    logits = torch.randn(50, config.num_experts)
    logits[:, 4:] += 100.0
    selection = select(logits, None, config, None, "all")
    expected = torch.softmax(logits[:, :4], dim=-1).topk(2).values.sum(dim=-1)
    assert selection.routing_map[:, 4:].sum() == 0
    # One softmax and one sum, in fp32.
    assert torch.allclose(selection.gates.sum(dim=-1), expected, rtol=1e-6)


def tagged_model(recompute: dict[str, Any]) -> Any:
    moepp = MoEPPConfig(num_ffn_experts=4, num_zero_experts=3, balance_coeff=0.1)
    model = build_model(moepp, **recompute)
    torch.manual_seed(5)
    randomize(model, std=0.1)
    model.token_tags = TokenTags(SEQUENCE, position_bins=3, frequency_bins=2)
    model.token_tags.forced_ids = torch.arange(VOCAB) % 3 == 0
    model.token_tags.classes = (torch.arange(VOCAB) >= VOCAB // 2).long()
    for layer in layers_of(model):
        layer.router.set_ffn_demand("one")
        layer.statistics.num_cells = model.token_tags.num_cells
    return model


def layers_of(model: torch.nn.Module) -> list[MoEPPLayer]:
    return [module for module in model.modules() if isinstance(module, MoEPPLayer)]


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_tags_stay_with_their_micro_batch(granularity: str) -> None:
    """As in a pipeline: the second micro-batch goes forward before the first goes backward."""
    recompute: dict[str, Any] = {"recompute_granularity": granularity}
    if granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    else:
        recompute |= {"recompute_modules": ["moe"]}
    batches = torch.randint(VOCAB, (2, 2, SEQUENCE + 1))
    results = []
    for settings in ({}, recompute):
        model = tagged_model(settings)
        losses = [token_losses(model, tokens) for tokens in batches]
        for loss in losses:
            loss.sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        results.append((losses, gradients, moe_statistics(model)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(one, other)
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name
    for number, statistics in results[0][2].items():
        assert torch.equal(statistics.cells, results[1][2][number].cells)
        assert statistics.cells[:, 1].sum() == batches[:, :, :-1].numel()
        assert statistics.cells[:, 0].sum() == statistics.wanted_counts()[:4].sum()
        assert (statistics.wanted != statistics.selected).any()


def test_tags() -> None:
    tags = TokenTags(seq_length=4, position_bins=2, frequency_bins=2)
    tags.classes = torch.tensor([0, 1, 1])
    tags.forced_ids = torch.tensor([False, True, False])
    ids = torch.tensor([[0, 1, 2, 1]])
    made = tags(ids, torch.arange(4).unsqueeze(0), is_sequence_parallel=False)
    assert made.shape == (4, 1)
    assert cells(made).tolist() == [0, 1, 3, 3]
    assert forced_tokens(made).tolist() == [False, True, False, True]
    assert forced_tokens(None) is None
