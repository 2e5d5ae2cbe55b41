"""Generation on test ranks, and the naive loop that it is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.parallel.training_runs import join, settings

# Long enough for prompts of several lengths and some dozen new tokens.
LENGTH = 48
# No token of the model's vocabulary is it: nothing ends before its time.
NO_EOD = -7


def model_settings(**sections: dict[str, Any]) -> dict[str, Any]:
    return settings(**{**sections, "model": {"seq_length": LENGTH, **sections.get("model", {})}})


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
    sampling: dict[str, Any],
    eod: int = NO_EOD,
) -> tuple[list[list[int]], list[Any]]:
    """New tokens, and on the last stage the logits [b, vocab] of every pass."""
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

    decoding.CachedModel.read = read_watched
    try:
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
    finally:
        decoding.CachedModel.read = read
    return new, seen


def scored_again(
    raw: dict[str, Any],
    prompts: list[list[int]],
    new_tokens: int,
    sampling: dict[str, Any],
    eod: int = NO_EOD,
) -> tuple[list[list[int]], list[list[Any]]]:
    """The naive loop, on one process: all of the text again for every new token, prompt by prompt.

    Returns:
        New tokens, and of each prompt the logits [vocab] that every one of them was drawn from.
    """
    import torch

    from moepp_megatron.training.decoding import sample
    from moepp_megatron.training.generate_request import Sampling

    how = Sampling(**sampling)
    _, _, (model,) = build(raw, [])
    model.eval()
    all_new, all_logits = [], []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(how.seed + number)
        ids, logits = list(prompt), []
        while len(ids) < len(prompt) + new_tokens:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                last = model(tokens, torch.arange(len(ids)).unsqueeze(0), None)[0, -1].float()
            logits.append(last.numpy().copy())
            token = sample(last, how.temperature, how.top_p, generator)
            if token == eod:
                break
            ids.append(token)
        all_new.append(ids[len(prompt) :])
        all_logits.append(logits)
    return all_new, all_logits


def drawn_from(passes: list[Any], prompts: list[list[int]], row: int, count: int) -> Any:
    """The logits [count, vocab] that the new tokens of a prompt were drawn from."""
    first = len(prompts[row]) - min(len(prompt) for prompt in prompts)
    return np.stack([logits[row] for logits in passes[first : first + count]])
