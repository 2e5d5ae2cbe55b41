"""Zero-computation experts switched off: against the reference; tags through recomputation."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import MoEPPLayer, moe_statistics
from moepp_megatron.moe.selection import select
from moepp_megatron.moe.token_tags import TokenTags, cells
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


@pytest.mark.parametrize(("changes", "dispatcher"), SETTINGS)
def test_layer_is_the_reference(changes: dict[str, Any], dispatcher: str) -> None:
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
    layer.router.ffn_only = True
    reference = reference_of(layer)
    reference.ffn_only = True
    reference.selection_bias_E = layer.router.expert_bias

    hidden = torch.randn(LENGTH, BATCH, HIDDEN, requires_grad=True)
    previous = torch.randn(LENGTH, BATCH, moepp.num_experts, requires_grad=True)
    output, logits = layer(hidden, previous)
    weights = torch.randn_like(output)
    ((output * weights).sum() + logits.sum()).backward()

    x = hidden.detach().view(-1, HIDDEN).clone().requires_grad_()
    z = previous.detach().view(len(x), -1).clone().requires_grad_()
    expected = reference(x, z)
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
    assert made.tolist() != own.statistics.selected.tolist(), "the router wanted others"


def test_the_balance_loss_is_of_the_routers_own_choice() -> None:
    moepp = MoEPPConfig(num_ffn_experts=4, balance_coeff=0.5)
    hidden = torch.randn(LENGTH, BATCH, HIDDEN)
    previous = torch.randn(LENGTH, BATCH, moepp.num_experts)
    free = build_layer(moepp)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    losses, gradients = [], []
    for ffn_only in (False, True):
        layer = build_layer(moepp)
        layer.load_state_dict(free.state_dict())
        layer.router.ffn_only = ffn_only
        z = previous.clone().requires_grad_()
        output, _ = layer(hidden, z)
        (output * 0).sum().backward()  # the balance loss alone reaches the logits
        losses.append(layer.statistics.balance_loss)
        gradients.append(z.grad)
    assert losses[0] == losses[1]
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


def test_gates_are_those_of_a_router_without_other_experts() -> None:
    """Even where the router wants nothing but zero-computation experts."""
    config = MoEPPConfig(num_ffn_experts=4)
    logits = torch.randn(50, config.num_experts)
    logits[:, 4:] += 100.0
    selection = select(logits, None, config, None, ffn_only=True)
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
    model.token_tags.classes = (torch.arange(VOCAB) >= VOCAB // 2).long()
    for layer in layers_of(model):
        layer.router.ffn_only = True
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
        assert torch.equal(statistics.tagged.cells, results[1][2][number].tagged.cells)
        assert statistics.tagged.cells[:, 1].sum() == batches[:, :, :-1].numel()
        assert statistics.tagged.cells[:, 0].sum() == statistics.wanted_counts()[:4].sum()
        assert (statistics.wanted != statistics.selected).any()


def test_tags() -> None:
    tags = TokenTags(seq_length=4, position_bins=2, frequency_bins=2)
    tags.classes = torch.tensor([0, 1, 1])
    ids = torch.tensor([[0, 1, 2, 1]])
    made = tags(ids, torch.arange(4).unsqueeze(0), is_sequence_parallel=False)
    assert made.shape == (4, 1)
    assert cells(made).tolist() == [0, 1, 3, 3]
