"""Attention within documents: Transformer Engine's packed sequences against the mask."""

import pytest
import torch
from transformer_engine.pytorch import DotProductAttention

from moepp_megatron.config import UnfitError
from moepp_megatron.model.document_attention import dense_mask, document_ends
from moepp_megatron.runtime import fit
from tests.parallel.training_runs import LATENT_WIDTHS
from tests.te_stand_in.models import BATCH, SEQUENCE, VOCAB, compare_gradients, config_of, model_of
from tests.te_stand_in.test_latent_attention import PROJECTIONS, local_model

DATA = {"reset_attention_mask": True}


def losses(model, mask):
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE + 1), generator=torch.manual_seed(3))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    padding = positions >= torch.tensor([[SEQUENCE], [SEQUENCE - 3]])
    labels = tokens[:, 1:].contiguous()
    found = model(tokens[:, :-1].contiguous(), positions, mask, labels=labels, padding_mask=padding)
    return found[~padding]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"num_query_groups": 1}},
        {"training": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}},
    ],
    ids=["plain", "grouped queries", "recomputed"],
)
def test_packed_sequences_are_the_mask(changes, monkeypatch):
    formats = []
    forward = DotProductAttention.forward

    def counting(*arguments, **settings):
        formats.append(settings.get("qkv_format"))
        return forward(*arguments, **settings)

    monkeypatch.setattr(DotProductAttention, "forward", counting)
    config = config_of(None, data=DATA, precision={"dtype": "fp32"}, **changes)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [2] * 7, [0] * 13 + [1] * 3])
    theirs, whole = model_of(config), model_of(config)
    found = losses(theirs, document_ends(documents))
    found.sum().backward()
    assert set(formats) == {"thd"}
    without = losses(whole, None)
    assert formats[-1] != "thd"
    assert not torch.allclose(found, without, rtol=1e-3)
    ours = local_model(config, monkeypatch)
    expected = losses(ours, dense_mask(documents))
    expected.sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    compared = compare_gradients(theirs, ours, PROJECTIONS)
    assert compared == 2 * config.model.num_layers


REFUSED = {
    "context_parallel_size .2. must be 1": {"parallel": {"context_parallel_size": 2}},
    "latent_attention must be null": {"model": {"latent_attention": LATENT_WIDTHS}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_packed_sequences_cannot_carry(message, monkeypatch):
    monkeypatch.setattr(fit, "have_transformer_engine", lambda: True)
    fit.check_fit(config_of(None, data=DATA))
    with pytest.raises(UnfitError, match=message):
        fit.check_fit(config_of(None, data=DATA, **REFUSED[message]))
