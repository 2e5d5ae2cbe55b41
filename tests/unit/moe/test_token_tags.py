"""Tags of tokens, and that they stay with their micro-batch through recomputation."""

import pytest
import torch

from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.layer import moe_statistics, moepp_layers
from moepp_megatron.moe.token_tags import TokenTags, _sources, groups
from tests.parallel.training_runs import FULL, SELECTIVE
from tests.unit.moe.builders import SEQUENCE, VOCAB, build_model, randomize, token_losses


def tagged_model(recompute):
    moepp = MoEPPConfig(4, num_zero_experts=3, balance_coeff=0.1)
    model = build_model(moepp, **recompute)
    torch.manual_seed(5)
    randomize(model, std=0.1)
    model.token_tags = TokenTags()
    model.token_tags.groups = torch.arange(VOCAB) % 5
    for layer in moepp_layers(model):
        layer.statistics.num_groups = 5
    return model


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE], ids=["full", "selective"])
def test_tags_stay_with_their_micro_batch(recompute):
    """As in a pipeline: the second micro-batch goes forward before the first goes backward."""
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
    ids = batches[:, :, :-1]
    for number, statistics in results[0][2].items():
        assert torch.equal(statistics.groups, results[1][2][number].groups)
        assert statistics.groups[:, 1].tolist() == torch.bincount(ids.flatten() % 5).tolist()
        assert statistics.groups[:, 0].sum() == statistics.selected[:4].sum()


def test_tags():
    tags = TokenTags()
    ids = torch.tensor([[0, 1, 2, 1]])
    assert groups(tags(ids, is_sequence_parallel=False)).tolist() == [0] * 4
    tags.groups = torch.tensor([0, 7, 3])
    made = tags(ids, is_sequence_parallel=False, sources=torch.tensor([[0, 1, 1, 2]]).int())
    assert made.shape == (4, 1)
    assert groups(made).tolist() == [0, 7, 3, 7]
    assert _sources(made).tolist() == [0, 1, 1, 2]
