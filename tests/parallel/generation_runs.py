"""Generation on test ranks, and the naive loop that it is held against."""

from typing import Any

import numpy as np

from tests.parallel.training_runs import join, settings

# Long enough for prompts of several lengths and some dozen new tokens.
LENGTH = 48
# No token of the model's vocabulary is it: nothing ends before its time.
NO_EOD = -7


def model_settings(**sections: dict[str, Any]) -> dict[str, Any]:
    model = {"seq_length": LENGTH, "num_layers": 2, **sections.get("model", {})}
    return settings(**{**sections, "model": model})


def prompts_of(lengths: list[int], vocab_size: int = 64) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, vocab_size, length).tolist() for length in lengths]


def build(raw: dict[str, Any], overrides: list[str]) -> tuple[Any, Any, list[Any]]:
    """Configuration for generation, layout, and a model with the seed's weights."""
    import torch.distributed as dist

    from moepp_megatron.config import parse_config
    from moepp_megatron.model.build import build_model
    from moepp_megatron.training.generate_request import generation_config

    config = generation_config(parse_config(raw), overrides, dist.get_world_size())
    layout = join(config)
    return config, layout, build_model(config)


def generated(
    raw: dict[str, Any],
    overrides: list[str],
    prompts: list[list[int]],
    new_tokens: int,
    samplings: list[dict[str, Any]],
    eod: int = NO_EOD,
) -> list[tuple[list[list[int]], list[Any]]]:
    """Of each way of sampling: new tokens; on the last stage all passes' logits [b, vocab]."""
    from moepp_megatron.runtime.patches import replaced
    from moepp_megatron.training import decoding
    from moepp_megatron.training.generate_request import Sampling

    config, layout, models = build(raw, overrides)
    seen: list[Any] = []
    read = decoding.CachedModel.read

    def read_watched(self: Any, tokens: Any) -> Any:
        logits = read(self, tokens)
        if logits is not None:
            seen.append(logits.numpy().copy())
        return logits

    found = []
    with replaced(decoding.CachedModel, read=read_watched):
        for sampling in samplings:
            new = decoding.continue_prompts(
                models,
                config,
                layout,
                prompts,
                new_tokens,
                Sampling(**sampling),
                eod=eod,
                vocab_size=config.model.vocab_size,
            )
            found.append((new, list(seen)))
            seen.clear()
    return found


def scored_again(
    raw: dict[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    samplings: list[dict[str, Any]],
    eod: int = NO_EOD,
) -> list[tuple[list[list[int]], list[list[Any]]]]:
    """The naive loop, on one process: all of the text again for every new token, prompt by prompt.

    Returns:
        For each way of sampling new tokens, and of each prompt the logits [vocab] that every one of
        them was drawn from.
    """
    from moepp_megatron.training.generate_request import Sampling

    _, _, (model,) = build(raw, [])
    model.eval()
    found = []
    for how in (Sampling(**sampling) for sampling in samplings):
        continued = [
            _continue(model, prompt, new_tokens, how, how.seed + number, eod)
            for number, prompt in enumerate(prompts)
        ]
        found.append(([new for new, _ in continued], [logits for _, logits in continued]))
    return found


def _continue(
    model: Any, prompt: list[int], new_tokens: int, how: Any, seed: int, eod: int
) -> tuple[list[int], list[Any]]:
    import torch

    from moepp_megatron.training.decoding import sample

    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    logits = []
    while len(new) < new_tokens:
        tokens = torch.tensor([prompt + new])
        with torch.no_grad():
            places = torch.arange(tokens.shape[1]).unsqueeze(0)
            last = model(tokens, places, None)[0, -1].float()
        logits.append(last.numpy().copy())
        token = sample(last, how.temperature, how.top_p, generator)
        if token == eod:
            break
        new.append(token)
    return new, logits


def drawn_from(passes: list[Any], prompts: list[list[int]], row: int, count: int) -> Any:
    """The logits [count, vocab] that the new tokens of a prompt were drawn from."""
    first = len(prompts[row]) - min(len(prompt) for prompt in prompts)
    return np.stack([logits[row] for logits in passes[first : first + count]])
