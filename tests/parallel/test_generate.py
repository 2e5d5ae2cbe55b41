"""Generation in every layout equals the naive loop of one process over one prompt at a time."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.parallel.training_runs import VANILLA, join, settings

NEW_TOKENS = 6
# No token of the model's vocabulary is it: nothing ends before its time.
NO_EOD = -7
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
# Of several lengths, and twice the same.
PROMPTS = [np.random.default_rng(3).integers(0, 64, length).tolist() for length in (5, 9, 1, 5)]
PROMPTS[3] = PROMPTS[0]

TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
EP2 = "parallel.expert_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
LAYOUTS = {
    "one process": (1, []),
    "replicas": (2, []),
    "tp2": (2, [TP2]),
    "ep2": (2, [EP2]),
    "cp2": (2, [CP2]),
    "interleaved stages": (2, [PP2, VPP2]),
    "tp2 pp2": (4, [TP2, PP2]),
}
# What a model is trained with, and what generates the same.
MODELS = {
    "vanilla": (VANILLA, VANILLA),
    "capacity": ({"capacity_factor": 0.5}, {}),
    "jitter": ({"input_jitter_eps": 0.1}, {}),
}


def model_settings(sections):
    return settings(**sections | {"model": {"seq_length": 48, "num_layers": 4}})


def build(raw, overrides):
    """The request to score with room for new tokens, and a model with the seed's weights."""
    import torch.distributed as dist

    from moepp_megatron.config import parse_config
    from moepp_megatron.interop.score import ScoreRequest
    from moepp_megatron.model.build import build_model

    room = np.zeros((len(PROMPTS), 16), dtype=np.int64)
    size = dist.get_world_size()
    scoring = ScoreRequest.of(Path("unused"), parse_config(raw), room, overrides, size)
    join(scoring.config)
    return scoring, build_model(scoring.config)


def generated(raw, overrides, sampling, eod=NO_EOD):
    from moepp_megatron.interop.generate import GenerateRequest, Sampling
    from moepp_megatron.interop.scoring import continue_prompts
    from moepp_megatron.model.stage import evaluation_stages

    scoring, models = build(raw, overrides)
    stages = evaluation_stages(models, scoring.config)
    tokenizer = SimpleNamespace(eod=eod, vocab_size=60)
    how = Sampling(**sampling)
    request = GenerateRequest(scoring, tokenizer, PROMPTS, NEW_TOKENS, how)
    return continue_prompts(stages, request)


def scored_again(raw, sampling, eod=NO_EOD):
    import torch

    from moepp_megatron.interop.generate import Sampling
    from moepp_megatron.interop.scoring import _sample

    _, (model,) = build(raw, [])
    model.eval()
    how, found = Sampling(**sampling), []
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(how.seed + number)
        new = []
        while len(new) < NEW_TOKENS:
            tokens = torch.tensor([prompt + new])
            with torch.no_grad():
                places = torch.arange(tokens.shape[1]).unsqueeze(0)
                last = model(tokens, places, None)[0, -1, :60].float()
            token = _sample(last, how, generator)
            if token == eod:
                break
            new.append(token)
        found.append(new)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_equals_scoring_again(ranks, on_one_rank, layout, sampling):
    raw, (size, overrides) = model_settings({}), LAYOUTS[layout]
    expected = on_one_rank(scored_again, raw, sampling)
    assert ranks(size).run(generated, raw, overrides, sampling) == [expected] * size
    if sampling is SAMPLED:
        # The same prompt twice is continued in two ways.
        assert expected[0] != expected[3]


@pytest.mark.parametrize("name", MODELS)
def test_what_only_training_wants_is_off(ranks, on_one_rank, name):
    trained, plain = (model_settings({"moe": moe}) for moe in MODELS[name])
    expected = on_one_rank(scored_again, plain, SAMPLED)
    assert ranks(2).run(generated, trained, [PP2], SAMPLED) == [expected] * 2


def test_ends_at_end_of_document(ranks, on_one_rank):
    raw = model_settings({})
    endless = on_one_rank(generated, raw, [], SAMPLED)
    eod = endless[1][NEW_TOKENS - 2]
    expected = on_one_rank(scored_again, raw, SAMPLED, eod)
    assert len(expected[1]) < NEW_TOKENS
    for size, overrides in ((1, []), (2, [PP2])):
        assert ranks(size).run(generated, raw, overrides, SAMPLED, eod) == [expected] * size


def generate_from_nan(raw, overrides):
    import torch

    from moepp_megatron.model import build as model_building
    from moepp_megatron.runtime.patches import replaced

    made = model_building.build_model

    def build_from_nan(config):
        models = made(config)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.fill_(float("nan"))
        return models

    try:
        with replaced(model_building, build_model=build_from_nan):
            generated(raw, overrides, SAMPLED)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_logits_that_are_no_numbers_are_an_error_on_every_rank(ranks):
    ends = ranks(2).run(generate_from_nan, model_settings({}), [PP2])
    assert all("not finite" in end for end in ends)
