"""Tokens per second of `moepp generate` with its cache, and without, in turn.

    python benchmarks/generate.py [--config configs/quickstart.yaml] [--new-tokens 64,128,256]
        [--clock cpu]

One process, fresh weights, greedy, no end-of-document token. "Without" runs the whole text again
for every token, as scoring would. Both run in each round, in alternating order, and the ratio is
the median over the rounds: other load on the machine falls on both. On a machine where others
work too, `--clock cpu` on one thread (`taskset -c 0`) counts the processor's seconds instead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moepp_megatron.config import Layout, load_config
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.quiet import quiet
from moepp_megatron.runtime.rank import RankEnvironment

ROOT = Path(__file__).resolve().parents[1]
PROMPT_LENGTH = 16


def with_cache(models: list[Any], config: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """As the command does."""
    from moepp_megatron.training.decoding import continue_prompts
    from moepp_megatron.training.generate_request import Sampling

    (new,) = continue_prompts(
        models,
        config,
        Layout.from_config(config, 1),
        [prompt],
        new_tokens,
        Sampling(temperature=0.0),
        eod=-7,
        vocab_size=config.model.vocab_size,
    )
    return new


@torch.no_grad()
def without_cache(models: list[Any], config: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """All of the text for every token."""
    (model,) = models
    model.eval()
    ids = list(prompt)
    for _ in range(new_tokens):
        tokens = torch.tensor([ids])
        logits = model(tokens, torch.arange(len(ids)).unsqueeze(0), None)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--new-tokens", default="64,128,256")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    arguments = parser.parse_args()
    quiet()
    clock = CLOCKS[arguments.clock]
    lengths = [int(text) for text in arguments.new_tokens.split(",")]
    distributed.start(RankEnvironment())
    from moepp_megatron.model.build import build_model
    from moepp_megatron.training.generate_request import generation_config

    room = PROMPT_LENGTH + max(lengths)
    config = load_config(arguments.config, [f"model.seq_length={room}"])
    config = generation_config(config, [], 1)
    distributed.build_groups(config, Layout.from_config(config, 1))
    models = build_model(config)
    prompt = torch.randint(config.model.vocab_size, (PROMPT_LENGTH,)).tolist()
    ways = {"with": with_cache, "without": without_cache}
    for run in ways.values():
        run(models, config, prompt, 4)
    unit = f"tokens per {arguments.clock} second"
    print(f"| new tokens | with cache, {unit} | without, {unit} | ratio (range) | rounds |")
    print("|---|---|---|---|---|")
    for length in lengths:
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(arguments.rounds):
            order = list(ways) if number % 2 == 0 else list(ways)[::-1]
            made = {}
            for name in order:
                begin = clock()
                made[name] = ways[name](models, config, prompt, length)
                times[name].append(clock() - begin)
            assert made["with"] == made["without"], "the two ways give other tokens"
        ratios = [b / a for a, b in zip(times["with"], times["without"], strict=True)]
        speed = {name: length / statistics.median(values) for name, values in times.items()}
        print(
            f"| {length} | {speed['with']:.1f} | {speed['without']:.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{len(ratios)} |",
            flush=True,
        )
    distributed.stop()


if __name__ == "__main__":
    main()
