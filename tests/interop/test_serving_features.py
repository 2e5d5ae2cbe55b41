"""Exported models with the features that transformers 5 offers to its own MoE models."""

import re
from unittest import mock

import numpy as np
import pytest

from tests.interop.test_finetuning import batch, random_model

PATHS = ("eager", "grouped_mm", "batched_mm")


def experts_by(path):
    """Logits, rows that FFN experts multiplied, and FFN experts that routers picked."""
    import torch
    from torch.nn import functional
    from transformers import LlamaForCausalLM
    from transformers.integrations import moe

    # What transformers caches on Llama must not be ours.
    assert not LlamaForCausalLM._can_set_experts_implementation()
    model = random_model(num_zero_experts=2, num_copy_experts=2).eval()
    model.set_experts_implementation(path)
    rows, picks = [], []

    def counted(function):
        def call(x, weight, offsets=None, *args, **kwargs):
            # The first of an expert's two products; the grouped one ends at the last offset.
            if weight.shape[-2:] == (96, 32) and (offsets is not None or x.dim() == 2):
                rows.append(len(x) if offsets is None else int(offsets[-1]))
            given = () if offsets is None else (offsets,)
            return function(x, weight, *given, *args, **kwargs)

        return call

    originals = moe._grouped_linear, moe._batched_linear, functional.linear
    moe._grouped_linear, moe._batched_linear, functional.linear = map(counted, originals)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "moe"):
            layer.mlp.moe.gate.register_forward_hook(
                lambda module, args, output: picks.append(int((output[1] < 4).sum()))
            )
    try:
        with torch.no_grad():
            logits = model(**batch()).logits.numpy()
    finally:
        moe._grouped_linear, moe._batched_linear, functional.linear = originals
    return logits, sum(rows), sum(picks)


def test_experts_multiply_the_rows_that_routers_pick(plain):
    expected, *_ = plain(experts_by, "eager")
    for path in PATHS:
        logits, rows, picks = plain(experts_by, path)
        # Products of the same rows in another order, in fp32.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        assert rows == picks > 0, path
        # Two picks of 24 tokens in three layers.
        assert picks < 2 * 24 * 3, "no zero-computation expert was picked"


def cacheable(graph, inputs):
    """A backend that refuses what torch's caches, vLLM's among them, have no name for."""
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable

    check_cacheable(graph)
    return graph


def decoded_without_breaks(path):
    """The logits of a compiled decoding step with a static cache, and of the whole text."""
    import torch
    from transformers import StaticCache

    model = random_model().eval()
    model.set_experts_implementation(path)
    ids = batch()["input_ids"][:, :6]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(input_ids=ids[:, :5], cache=cache)
        step = torch.compile(model.forward, fullgraph=True, backend=cacheable)
        position = torch.full((2, 1), 5)
        logits = step(input_ids=ids[:, 5:], cache=cache, position_ids=position).logits[:, -1]
    return logits.numpy(), expected.numpy()


@pytest.mark.parametrize("path", ["grouped_mm", "batched_mm"])
def test_decoding_compiles_without_graph_breaks(plain, path):
    logits, expected = plain(decoded_without_breaks, path)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def generated():
    """Greedy texts of one prompt by every way to generate."""
    import torch

    model = random_model().eval()
    draft = random_model(num_hidden_layers=2, moe_layers=None).eval()
    ids = batch()["input_ids"][:1, :5]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    ways = {
        "plain": {},
        "assisted": {"assistant_model": draft},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "static cache": {"cache_implementation": "static"},
    }
    return {name: model.generate(ids, **settings, **way)[0].tolist() for name, way in ways.items()}


def test_every_way_to_generate_gives_the_same_text(plain):
    texts = plain(generated)
    assert len(set(map(tuple, texts.values()))) == 1, texts


def packed():
    """Logits of two texts in one row without padding, and of each by itself."""
    import torch

    model, ids = random_model().eval(), batch()["input_ids"]
    texts = [ids[:1, :7], ids[1:, :5]]
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.no_grad():
        row = model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False)
        alone = torch.cat([model(input_ids=text).logits[0] for text in texts])
    return row.logits[0].numpy(), alone.numpy()


def test_texts_without_padding(plain):
    row, alone = plain(packed)
    np.testing.assert_allclose(row, alone, rtol=0, atol=1e-5)


def attentions(qk_norm):
    model = random_model(qk_norm=qk_norm).eval()
    model.set_attn_implementation("eager")
    return [tuple(value.shape) for value in model(**batch(), output_attentions=True).attentions]


@pytest.mark.parametrize("qk_norm", [True, False])
def test_attentions_are_returned(plain, qk_norm):
    assert plain(attentions, qk_norm) == [(2, 4, 12, 12)] * 4


def saved(folder, changes):
    """Save a model; its logits."""
    import torch

    model = random_model(**changes).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(**batch()).logits.numpy()


def divided(folder):
    """Logits of this rank's part of the model, its FFN weights' shape, and what the plan lacks."""
    import torch

    from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPForCausalLM

    model = MoEPPForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    absent = [
        pattern
        for pattern in model.tp_plan
        if not any(re.fullmatch(pattern.replace("*", r"\d+"), name) for name in names)
    ]
    weight = model.model.layers[0].mlp.moe.experts.ffn.gate_up_proj
    with torch.no_grad():
        logits = model(**batch()).logits
    return logits.numpy(), tuple(weight.to_local().shape), absent


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm_scope": "all_heads"},
        {"qk_norm": False, "shared_expert_intermediate_size": None, "moe_layers": None},
    ],
)
def test_tensor_parallel_ranks_compute_the_same(ranks, plain, tmp_path, changes):
    expected = plain(saved, tmp_path / "hf", changes)
    for logits, shape, absent in ranks(2).run(divided, tmp_path / "hf"):
        # Partial sums of two ranks, in fp32.
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
        assert shape == (2, 96, 32), "two of four experts"
        assert absent == []


def spread(folder):
    """Logits of a model with layers in memory and on disk, and how many layers gave their own."""
    import torch

    from moepp_megatron.interop.hf_files.modeling_moepp import MoEPPForCausalLM

    others = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    places = {f"model.layers.{index}": ("cpu", "disk")[index % 2] for index in range(4)}
    model = MoEPPForCausalLM.from_pretrained(
        folder,
        device_map=places | dict.fromkeys(others, "cpu"),
        offload_folder=folder / "offloaded",
        experts_implementation="eager",
    ).eval()
    with torch.no_grad():
        output = model(**batch(), output_router_logits=True)
    return output.logits.numpy(), len(output.router_logits)


def by_sums(function, *args):
    """The function, with products as sums, which round alike wherever in memory the weights lie."""

    def linear(x, weight, bias=None):
        return (x.unsqueeze(-2) * weight).sum(-1) + (0 if bias is None else bias)

    with mock.patch("torch.nn.functional.linear", linear):
        return function(*args)


def test_layers_on_several_devices_compute_the_same(plain, tmp_path):
    pytest.importorskip("accelerate")
    expected = plain(by_sums, saved, tmp_path / "hf", {"experts_implementation": "eager"})
    logits, layers = plain(by_sums, spread, tmp_path / "hf")
    np.testing.assert_array_equal(logits, expected)
    assert layers == 3


def pipeline_plans():
    """Names in the plan that are modules, with and without gating residuals."""
    models = [random_model(gating_residual=flag).model for flag in (True, False)]
    return [[hasattr(model, name) for name in model._pp_plan] for model in models]


def test_pipeline_stages_are_planned_where_hidden_states_are_all(plain):
    assert plain(pipeline_plans) == [[], [True, True, True]]


def continued_in_turns():
    """New tokens of three prompts by continuous batching, and of each by itself."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model, ids = random_model().eval(), batch()["input_ids"]
    prompts = [ids[:1, :5], ids[1:, :9], ids[:1, 3:5]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    found = model.generate_batch(
        [prompt[0].tolist() for prompt in prompts],
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32),
        progress_bar=False,
    )
    alone = []
    for prompt in prompts:
        mask = torch.ones_like(prompt)
        whole = model.generate(prompt, attention_mask=mask, generation_config=settings)
        alone.append(whole[0, prompt.shape[1] :].tolist())
    return [found[f"req_{number}"].generated_tokens for number in range(3)], alone


def test_continuous_batching_gives_the_same_tokens(plain):
    together, alone = plain(continued_in_turns)
    assert together == alone
