"""Causal attention for GPUs without Transformer Engine against megatron-core's local one."""

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from moepp_megatron.model.attention import CausalAttention
from moepp_megatron.model.document_attention import dense_mask, document_ends, document_numbers
from moepp_megatron.model.local_modules import fit_local_modules
from moepp_megatron.moe.config import MoEPPConfig
from moepp_megatron.moe.spec import get_moepp_layer_spec
from tests.unit.moe.builders import megatron_config

MOEPP = MoEPPConfig(4)
HEADS, WIDTH, BATCH = 6, 8, 2


def attention(kind, groups, dtype, **arguments):
    config = megatron_config(
        MOEPP,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
    )
    mask = AttnMaskType.causal
    return kind(config=config, layer_number=1, attn_mask_type=mask, attention_type="", **arguments)


def leaves(tokens, groups, dtype):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, HEADS), (tokens, groups), (tokens, groups)]
    return [
        torch.randn(s, BATCH, heads, WIDTH, generator=generator).to(dtype).requires_grad_()
        for s, heads in shapes
    ]


def outcome(module, inputs, mask=None):
    """Output and gradients of queries, keys and values."""
    output = module(*inputs, mask)
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output.float() * weight).sum().backward()
    return [output.detach(), *(each.grad for each in inputs)]


@pytest.mark.parametrize("tokens", [1, 2, 12])
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_equals_megatron_cores(tokens, groups, dtype, tolerance):
    ours, theirs = (
        outcome(attention(kind, groups, dtype), leaves(tokens, groups, dtype))
        for kind in (CausalAttention, DotProductAttention)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype is dtype
        error = (actual.float() - expected.float()).abs().max()
        # Relative to the largest value: single sums cancel. Gradients of a lone token's queries
        # and keys are zero.
        assert error <= tolerance * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("groups", [6, 2])
def test_documents_equal_megatron_cores_with_its_mask(groups):
    """The mask is that of megatron-core's dataset, and both attentions honour it."""
    tokens = torch.tensor([[5, 0, 3, 4, 0, 0, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 0]])
    documents = document_numbers(tokens, eod=0)
    mask = dense_mask(documents)
    for row, own in zip(tokens, mask, strict=True):
        theirs, *_ = _get_ltor_masks_and_position_ids(row, 0, False, True, False, True)
        assert torch.equal(own, theirs)
    dtype = torch.float32
    ours, theirs = (
        outcome(attention(kind, groups, dtype), leaves(9, groups, dtype), mask)
        for kind in (CausalAttention, DotProductAttention)
    )
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)
    whole = outcome(attention(CausalAttention, groups, dtype), leaves(9, groups, dtype))
    assert not torch.allclose(whole[0], ours[0], atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "masked", "heads"),
    [
        (torch.bfloat16, False, 2),
        (torch.bfloat16, True, HEADS),
        (torch.float32, False, HEADS),
        (torch.float32, True, HEADS),
    ],
)
def test_shared_keys_are_repeated_where_no_kernel_of_a_gpu_takes_them(
    monkeypatch, dtype, masked, heads
):
    """Only flash attention takes shared keys, in 16 bits and without a mask; a CPU's takes all."""
    given = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recorded(*tensors, **options):
        given.extend(tensors)
        return kernel(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    documents = torch.zeros(BATCH, 9, dtype=torch.long)
    mask = dense_mask(documents) if masked else None
    module, tensors = attention(CausalAttention, 2, dtype), leaves(9, 2, dtype)
    module(*tensors, mask)
    assert [each.shape[1] for each in given] == [HEADS, 2, 2]
    given.clear()
    away = None if mask is None else mask.to("meta")
    elsewhere = module(*(each.to("meta") for each in tensors), away)
    assert elsewhere.shape == (9, BATCH, HEADS * WIDTH)
    assert [each.shape[1] for each in given] == [HEADS, heads, heads]


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_keys_give_what_shared_ones_do(monkeypatch, masked):
    """Each head of queries keeps its keys, and their gradients are sums over these heads."""
    documents = torch.tensor([[0] * 4 + [1] * 5] * BATCH)
    mask = dense_mask(documents) if masked else None
    module = attention(CausalAttention, 2, torch.float32)
    shared = outcome(module, leaves(9, 2, torch.float32), mask)
    takes = "moepp_megatron.model.attention._takes_shared_keys"
    monkeypatch.setattr(takes, lambda query, mask: False)
    repeated = outcome(module, leaves(9, 2, torch.float32), mask)
    for actual, expected in zip(repeated, shared, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6)


def test_ends_of_documents_count_through_the_sequences():
    documents = torch.tensor([[0, 0, 1, 3], [3, 3, 4, 4]])
    ends = document_ends(documents)
    assert ends.dtype is torch.int32
    assert ends.tolist() == [0, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("last", [1, 3])
def test_tokens_behind_kept_keys_see_all_before_them(last):
    """As while text is generated: only the last tokens are queries."""
    module = attention(CausalAttention, 2, torch.float32)
    query, key, value = leaves(9, 2, torch.float32)
    whole = module(query, key, value, None)
    part = module(query[-last:], key, value, None)
    torch.testing.assert_close(part, whole[-last:])


def test_scale_and_width_of_values_are_as_given():
    """Latent attention has both."""
    module = attention(CausalAttention, 6, torch.float32, softmax_scale=0.1, v_channels=4)
    query, key, value = (each.detach() for each in leaves(5, 6, torch.float32))
    output = module(query, key, value[..., :4], None)
    assert output.shape == (5, BATCH, HEADS * 4)
    scores = 0.1 * torch.einsum("sbnd,tbnd->bnst", query, key)
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnst,tbnv->sbnv", scores.softmax(-1), value[..., :4]).flatten(2)
    torch.testing.assert_close(output, expected)


def test_what_it_would_not_honour_is_refused():
    module = attention(CausalAttention, 2, torch.float32)
    inputs = leaves(4, 2, torch.float32)
    with pytest.raises(ValueError, match=r"attention_bias \(Tensor\) must be None in CausalAtt"):
        module(*inputs, None, attention_bias=torch.ones(1))
    with pytest.raises(ValueError, match="must be causal with CausalAttention"):
        CausalAttention(module.config, 1, AttnMaskType.padding)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [({}, True), ({"attention_dropout": 0.1}, False), ({"window_size": (4, 0)}, False)],
)
def test_where_it_is_used(monkeypatch, changes, fits):
    config = megatron_config(MOEPP, **changes)
    assert not CausalAttention.suits(config), "no GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert CausalAttention.suits(config) == fits
    spec = get_moepp_layer_spec(
        config, MOEPP, use_transformer_engine=False, adapt=fit_local_modules
    )
    found = spec.submodules.self_attention.submodules.core_attention
    assert found is (CausalAttention if fits else DotProductAttention)
