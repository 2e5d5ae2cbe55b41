"""Samples text from a checkpoint, on one process, whatever layout wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from moepp_megatron.config import Config, ConfigError, Layout, load_config, with_overrides
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.model.build import build_model
from moepp_megatron.runtime import distributed
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.training.checkpoint import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    find_checkpoint,
    load_weights,
)

_ONE_RANK = (
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=null",
    "parallel.pipeline_model_parallel_layout=null",
    "parallel.expert_model_parallel_size=1",
    "parallel.expert_tensor_parallel_size=null",
    "parallel.context_parallel_size=1",
    "parallel.sequence_parallel=false",
)


def generate_text(
    checkpoint: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """Continue `prompt`; returns prompt and continuation.

    Args:
        checkpoint: A checkpoint folder or a run.
        prompt: Text to continue.
        max_new_tokens: Tokens to add at most; stops at the end-of-document token.
        temperature: 0 takes the likeliest token, 1 samples from the model's probabilities.
        top_p: Sample from the smallest set of tokens with this much probability.
        seed: Of the sampling.

    Raises:
        ConfigError: No checkpoint there, an empty prompt, or one that leaves no room.
    """
    folder = find_checkpoint(checkpoint)
    config = with_overrides(load_config(folder / CONFIG_FILE, []), list(_ONE_RANK))
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"checkpoint ({folder}) must hold {TOKENIZER_FILE} to turn text into tokens, and the "
            "model it was converted from had none; copy the model's tokenizer.json there"
        )
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    ids = tokenizer.encode(prompt)
    if not 0 < len(ids) < config.model.seq_length:
        raise ConfigError(
            f"--prompt ({len(ids)} tokens) must have between 1 and "
            f"{config.model.seq_length - 1} tokens; shorten it or give it some text"
        )
    model = _load(folder, config)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = next_token_logits(model, ids[-config.model.seq_length :])
        token = sample(logits, temperature, top_p, generator)
        if token == tokenizer.eod:
            break
        ids.append(token)
    distributed.stop()
    return tokenizer.decode(ids)


def _load(folder: Path, config: Config) -> GPTModel:
    distributed.start(RankEnvironment())
    distributed.build_groups(config, Layout.from_config(config, 1))
    (model,) = build_model(config)
    load_weights(folder, [model])
    return model.eval()


@torch.no_grad()
def next_token_logits(model: GPTModel, ids: list[int]) -> Tensor:
    """[vocab] fp32 logits after the last of `ids`."""
    device = torch.cuda.current_device()
    tokens = torch.tensor([ids], device=device)
    positions = torch.arange(len(ids), device=device).unsqueeze(0)
    return model(tokens, positions, None)[0, -1].float().cpu()


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token: temperature, then nucleus sampling (arXiv 1904.09751).

    Args:
        logits: [vocab].
        temperature: 0 takes the largest logit.
        top_p: Probability of the nucleus.
        generator: Source of randomness.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    # A token stays while the tokens before it have not reached top_p; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before > top_p, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
