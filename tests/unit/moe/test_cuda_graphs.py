"""Attention, router and experts as CUDA graphs: replayed, they train like the uncaptured model."""

from dataclasses import replace

import pytest
import torch
from megatron.core import package_info
from megatron.core.transformer.cuda_graphs import create_cudagraphs
from megatron.core.transformer.enums import CudaGraphModule

from moepp_megatron.moe import spec as specs
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.lane import use_static_rows
from moepp_megatron.moe.layer import moe_statistics
from moepp_megatron.moe.local_experts import GroupedExperts
from moepp_megatron.moe.spec import get_moepp_layer_spec
from tests.graph_recorder import cpu_graphs, graphs_of
from tests.unit.moe.builders import (
    SEQUENCE,
    VOCAB,
    assert_close,
    build_model,
    megatron_config,
    randomize,
    tested_version_only,
    token_losses,
)

MOEPP = MoEPPConfig(4, router_topk=2)
PARTS = [["attn"], ["moe_router"], ["attn", "moe_router"]]
CASES = {
    "plain": MOEPP,
    "capacity, two-layer gate, selection bias, nonzero gates": MoEPPConfig(
        4,
        router_topk=2,
        capacity_factor=1.0,
        two_layer_gate=True,
        selection_bias=True,
        gate_normalization="nonzero",
    ),
}


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (2, SEQUENCE + 1), generator=generator)


def prepared(moepp, **changes):
    model = build_model(moepp, **changes)
    torch.manual_seed(3)
    randomize(model)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    return model


def gradients(model):
    """A graph adds to `main_grad`, autograd to `grad`; DDP would bring them together."""
    found = {}
    for name, parameter in model.named_parameters():
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = own + parameter.main_grad
    return found


def step(model, tokens):
    for parameter in model.parameters():
        parameter.grad = None
        parameter.main_grad.zero_()
    losses = token_losses(model, tokens)
    losses.sum().backward()
    return losses.detach(), gradients(model)


def assert_same_step(model, plain, tokens, what):
    """The same operations on the same numbers: equal to rounding of sums in another order."""
    losses, found = step(model, tokens)
    expected_losses, expected = step(plain, tokens)
    assert_close(losses, expected_losses, f"losses, {what}")
    for name, gradient in expected.items():
        assert_close(found[name], gradient, f"gradient of {name}, {what}")


@torch.no_grad()
def change_weights(model, plain, seed):
    """In place, as the optimizer and the selection bias's controller do."""
    torch.manual_seed(seed)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        if torch.is_tensor(ours) and ours.is_floating_point():
            noise = 0.05 * torch.randn_like(ours)
            ours.add_(noise)
            theirs.add_(noise)


@tested_version_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", PARTS, ids=["+".join(parts) for parts in PARTS])
def test_replayed_graphs_train_like_the_model(parts, case):
    plain = prepared(CASES[case])
    with cpu_graphs():
        model = prepared(CASES[case], cuda_graph_impl="local", cuda_graph_modules=list(parts))
        model.load_state_dict(plain.state_dict(), strict=False)
        assert_same_step(model, plain, batch(0), "recorded")
        create_cudagraphs()
        for seed in (1, 2):
            change_weights(model, plain, seed)
            assert_same_step(model, plain, batch(seed), f"replay {seed}")
        graphs = graphs_of(model)
        assert len(graphs) == len(parts) * 3, "one graph a layer and part"
        assert {graph.replays for graph in graphs} == {2}

        # Counted where it is not captured, once a step.
        theirs = moe_statistics(plain)
        for number, ours in moe_statistics(model).items():
            assert torch.equal(ours.selected, theirs[number].selected)
            assert ours.num_tokens == theirs[number].num_tokens
            assert_close(ours.balance_loss, theirs[number].balance_loss, "balance loss")

        # Evaluation does not touch the graphs, and takes sequences of any length.
        model.eval(), plain.eval()
        with torch.no_grad():
            short = batch(4)[:, : SEQUENCE // 2]
            assert_close(token_losses(model, short), token_losses(plain, short), "evaluation")
        assert {graph.replays for graph in graphs} == {2}


@tested_version_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("parts", [["moe_router"], ["attn", "moe_router"]], ids="+".join)
def test_experts_with_static_rows_are_captured(monkeypatch, parts, case):
    """And no graph is replayed in a step without static rows, before or after the capture."""
    monkeypatch.setattr(GroupedExperts, "suits", specs.CPUExperts.suits)
    monkeypatch.setattr(specs, "CPUExperts", GroupedExperts)
    moepp = replace(CASES[case], static_rows=1.2)
    changes = {"moe_shared_expert_intermediate_size": 24, "moe_layer_freq": [1, 0, 1]}
    plain = prepared(moepp, **changes)
    with cpu_graphs():
        changes |= {"cuda_graph_impl": "local", "cuda_graph_modules": list(parts)}
        model = prepared(replace(moepp, captures_experts=True), **changes)
        model.load_state_dict(plain.state_dict(), strict=False)
        replayed = 0
        for seed, is_static in enumerate([False, True, True, False, True]):
            change_weights(model, plain, seed)
            for each in (model, plain):
                use_static_rows(each, is_static)
            assert_same_step(model, plain, batch(seed), f"step {seed}")
            create_cudagraphs()
            replayed += is_static and seed > 1
            graphs = graphs_of(model)
            # Attention of three layers, router and experts of two; none before the first capture.
            assert len(graphs) == (3 * ("attn" in parts) + 2 * 2 if seed else 0)
            assert {graph.replays for graph in graphs} <= {replayed}
        assert replayed == 2
        theirs = moe_statistics(plain)
        for number, ours in moe_statistics(model).items():
            assert torch.equal(ours.selected, theirs[number].selected)
            assert ours.fill == theirs[number].fill


def test_what_reads_on_the_host_cannot_be_captured():
    """The recorder refuses what a GPU would: so passing above says something."""
    with cpu_graphs():
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match="not permitted when stream is capturing")
        with refused, torch.cuda.graph(graph):
            int(torch.ones(()))


@tested_version_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuda_graph_impl": "transformer_engine"}, "without the router logits; use local"),
        ({"cuda_graph_impl": "full_iteration"}, "host-side sizes of the all-to-all"),
        (
            {"cuda_graph_modules": [CudaGraphModule.moe]},
            r"\(\['moe'\]\) must hold attn, moe_router",
        ),
        ({"cuda_graph_modules": []}, r"\(\[\]\) must hold attn, moe_router"),
        ({"recompute_granularity": "selective"}, "runs forward once for each backward pass"),
    ],
)
def test_what_no_graph_can_hold_is_refused_with_the_reason(changes, message):
    config = megatron_config(MOEPP)
    # Set afterwards: megatron-core's own checks demand further settings for some.
    for name, value in {
        "cuda_graph_impl": "local",
        "cuda_graph_modules": [CudaGraphModule.attn],
        **changes,
    }.items():
        setattr(config, name, value)
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    with pytest.raises(ValueError, match=message):
        spec.submodules.mlp(config=config, pg_collection=None)


def test_graphs_are_refused_with_a_version_that_they_were_not_tested_with(monkeypatch):
    monkeypatch.setattr(package_info, "__shortversion__", "0.20.0")
    config = megatron_config(MOEPP)
    get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False).submodules.mlp(config=config)
    config.cuda_graph_impl = "local"
    config.cuda_graph_modules = [CudaGraphModule.attn]
    spec = get_moepp_layer_spec(config, MOEPP, use_transformer_engine=False)
    with pytest.raises(ValueError, match=r"must be none with megatron-core 0\.20\.0, because"):
        spec.submodules.mlp(config=config)
