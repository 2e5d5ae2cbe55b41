"""Generation with a cache equals scoring all of the text again for every token, in every layout."""

import json
from typing import Any

import numpy as np
import pytest

from tests.parallel.generation_runs import (
    build,
    drawn_from,
    generated,
    model_settings,
    prompts_of,
    scored_again,
)
from tests.parallel.ranks import RankPools
from tests.parallel.training_runs import VANILLA

# fp32, logits of size 3 to 4: attention over one query is another matrix product than over all,
# and another layout adds up in another order.
LOGITS = 2e-5
NEW_TOKENS = 6
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
# One is longer than the rest of its batch: part of it is read token by token.
PROMPTS = prompts_of([5, 9, 5])

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
ETP2 = "parallel.expert_tensor_parallel_size=2"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "replicas": (2, []),
    "tp2": (2, [TP2]),
    "tp2 etp2": (2, [TP2, ETP2]),
    "ep2": (2, [EP2]),
    "pp2": (2, [PP2]),
    "no layer on the first stage": (2, [PP2, "parallel.pipeline_model_parallel_layout=E|ttL"]),
    "tp2 ep2": (4, [TP2, EP2]),
    "tp2 pp2": (4, [TP2, PP2]),
    "pp2 ep2": (4, [PP2, EP2]),
}
# What may change the cache, the lane or the dispatch, each in a layout where it matters.
MODELS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "grouped queries": ({"model": {"num_query_groups": 2, "qk_layernorm": True}}, "tp2"),
    "first layer dense": ({"model": {"num_layers": 4}, "moe": {"layer_freq": [0, 1, 0, 1]}}, "pp2"),
    "shared expert": ({"moe": {"shared_expert_ffn_hidden_size": 16}}, "tp2"),
    "released rules": (
        {
            "moe": {
                "gate_normalization": "nonzero",
                "expert_input_scale": 2.0,
                "two_layer_gate": True,
                "logits_norm_std": 1.0,
            }
        },
        "ep2",
    ),
    "latent attention": (
        {
            "model": {
                "num_query_groups": None,
                "qk_layernorm": True,
                "latent_attention": {
                    "q_lora_rank": 24,
                    "kv_lora_rank": 16,
                    "qk_head_dim": 8,
                    "qk_pos_emb_head_dim": 4,
                    "v_head_dim": 6,
                },
            }
        },
        "tp2 pp2",
    ),
    "tied embeddings": ({"model": {"tie_embeddings": True}}, "pp2"),
    "vanilla": ({"moe": VANILLA}, "pp2"),
}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    """What the naive loop gave, by what it was given."""
    return {}


def check_equals_scoring(
    ranks: RankPools,
    references: dict[str, Any],
    sections: dict[str, dict[str, Any]],
    layout: str,
    samplings: list[dict[str, Any]],
    reference_sections: dict[str, dict[str, Any]] | None = None,
) -> None:
    raw = model_settings(**sections)
    reference = raw if reference_sections is None else model_settings(**reference_sections)
    key = json.dumps([reference, samplings])
    if key not in references:
        (references[key],) = ranks(1).run(scored_again, reference, PROMPTS, NEW_TOKENS, samplings)
    world_size, overrides = LAYOUTS[layout]
    by_rank = ranks(world_size).run(generated, raw, overrides, PROMPTS, NEW_TOKENS, samplings)
    for (expected, logits), *results in zip(references[key], *by_rank, strict=True):
        assert [new for new, _ in results] == [expected] * world_size
        passes = results[-1][1]
        for row, wanted in enumerate(logits):
            found = drawn_from(passes, PROMPTS, row, NEW_TOKENS)
            np.testing.assert_allclose(found, np.stack(wanted), rtol=0, atol=LOGITS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_scoring_again(ranks: RankPools, references: dict[str, Any], layout: str) -> None:
    check_equals_scoring(ranks, references, {}, layout, [GREEDY, SAMPLED])


@pytest.mark.parametrize("name", MODELS)
def test_kinds_of_models_equal_scoring_again(ranks, references: dict[str, Any], name: str) -> None:
    sections, layout = MODELS[name]
    check_equals_scoring(ranks, references, sections, layout, [SAMPLED])


@pytest.mark.parametrize(
    "moe", [{"capacity_factor": 0.5}, {"input_jitter_eps": 0.1}], ids=["capacity", "jitter"]
)
def test_what_only_training_wants_is_off(ranks, references: dict[str, Any], moe: dict[str, Any]):
    both = [GREEDY, SAMPLED]
    check_equals_scoring(ranks, references, {"moe": moe}, "one process", both, {})


def test_bf16_lane_crosses_stages_unrounded(ranks: RankPools) -> None:
    """The same operations in the same order: not a bit differs between one and two stages."""
    raw = model_settings(precision={"dtype": "bf16"})
    ((new, passes),) = ranks(1).run(generated, raw, [], PROMPTS, NEW_TOKENS, [GREEDY])[0]
    results = ranks(2).run(generated, raw, [PP2], PROMPTS, NEW_TOKENS, [GREEDY])
    assert [tokens for ((tokens, _),) in results] == [new, new]
    np.testing.assert_array_equal(results[1][0][1], passes)


def test_a_batch_is_its_prompts_one_by_one(ranks: RankPools) -> None:
    raw, prompts = model_settings(), [*prompts_of([6, 1, 9]), *prompts_of([6])]
    assert prompts[0] == prompts[3]
    ((together, _),) = ranks(1).run(generated, raw, [], prompts, NEW_TOKENS, [SAMPLED])[0]
    for number, prompt in enumerate(prompts):
        alone = {**SAMPLED, "seed": SAMPLED["seed"] + number}
        ((found, _),) = ranks(1).run(generated, raw, [], [prompt], NEW_TOKENS, [alone])[0]
        assert found == [together[number]]
    # The same prompt twice is continued in two ways.
    assert together[0] != together[3]


def test_ends_at_end_of_document(ranks: RankPools) -> None:
    raw = model_settings()
    ((endless, _),) = ranks(1).run(generated, raw, [], PROMPTS, NEW_TOKENS, [SAMPLED])[0]
    at = NEW_TOKENS - 2
    eod = endless[1][at]
    ((expected, _),) = ranks(1).run(scored_again, raw, PROMPTS, NEW_TOKENS, [SAMPLED], eod)[0]
    assert [len(tokens) for tokens in expected] != [NEW_TOKENS] * len(PROMPTS)
    assert len(expected[1]) <= at
    for world_size, overrides in ((1, []), (2, [PP2])):
        results = ranks(world_size).run(
            generated, raw, overrides, PROMPTS, NEW_TOKENS, [SAMPLED], eod
        )
        assert [new for ((new, _),) in results] == [expected] * world_size


def lanes(raw: dict[str, Any], prompt: list[int], new: int) -> tuple[Any, Any, list[Any]]:
    """Router logits of every MoE layer, by all tokens at once and with a cache, and what is cached.

    The two: layers x [s, 1, E]; and passes x layers x [n, 1, E], what the router was given
    from the layer before and what it gave.
    """
    import torch

    from moepp_megatron.moe.layer import MoEPPLayer
    from moepp_megatron.training.decoding import CachedModel

    config, _, models = build(raw, [])
    routed: list[tuple[Any, Any]] = []

    def watch(module: Any, inputs: tuple[Any, ...], routing: Any) -> None:
        given = inputs[1]
        routed.append((None if given is None else given.numpy(), routing.logits.numpy()))

    for module in models[0].modules():
        if isinstance(module, MoEPPLayer):
            module.router.register_forward_hook(watch)
    tokens = torch.tensor([prompt])
    models[0].eval()
    with torch.no_grad():
        models[0](tokens, torch.arange(len(prompt)).unsqueeze(0), None)
    whole = [logits for _, logits in routed]
    cached = CachedModel(models, config, 1, len(prompt))
    passes = []
    for begin, end in [
        (0, len(prompt) - new),
        *((at, at + 1) for at in range(len(prompt) - new, len(prompt))),
    ]:
        routed.clear()
        cached.read(tokens[:, begin:end])
        passes.append(list(routed))
    memory = cached.context.key_value_memory_dict
    return whole, passes, [sorted(tuple(t.shape) for t in pair) for pair in memory.values()]


def test_lane_is_as_long_as_the_hidden_states(ranks: RankPools) -> None:
    """The gating residual needs no cache: the layer before has just computed the same positions."""
    (prompt,) = prompts_of([20])
    whole, passes, cached = ranks(1).run(lanes, model_settings(), prompt, 8)[0]
    layers = len(whole)
    assert layers == 2
    for number, routed in enumerate(passes):
        positions = 12 if number == 0 else 1
        assert len(routed) == layers
        for layer, (given, logits) in enumerate(routed):
            assert logits.shape == (positions, 1, 12)
            if layer == 0:
                assert given is None
            else:
                np.testing.assert_array_equal(given, routed[layer - 1][1])
    for layer in range(layers):
        joined = np.concatenate([routed[layer][1] for routed in passes])
        np.testing.assert_allclose(joined, whole[layer], rtol=0, atol=LOGITS)
    # 4 heads of 8 channels, keys and values of 20 positions, in each of 2 layers: no more.
    assert cached == [[(20, 1, 4, 8)] * 2] * layers


def test_logits_that_are_no_numbers_are_an_error_on_every_rank(ranks: RankPools) -> None:
    ends = ranks(2).run(generate_from_nan, model_settings(), [PP2])
    assert all("not finite" in end for end in ends)


def generate_from_nan(raw: dict[str, Any], overrides: list[str]) -> str:
    import torch

    from moepp_megatron.training.decoding import continue_prompts
    from moepp_megatron.training.generate_request import Sampling

    config, layout, models = build(raw, overrides)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.fill_(float("nan"))
    try:
        continue_prompts(models, config, layout, [[1]], 2, Sampling(), eod=0, vocab_size=64)
    except FloatingPointError as error:
        return str(error)
    return "no error"
