"""Texts from a checkpoint's model: what `moepp generate` does, for it and for Python."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moepp_megatron.config import ConfigError, load_config
from moepp_megatron.data.chat_template import ChatTemplate
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import CONFIG_FILE
from moepp_megatron.interop.score import ScoreRequest, checkpoint_tokenizer, divisible
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.training.checkpoint.find import find_checkpoint
from moepp_megatron.training.inference_settings import inference_override

logger = logging.getLogger(__name__)

_DEFAULT_NEW_TOKENS = 96


@dataclass(frozen=True)
class Sampling:
    """Sampling options; prompt number i, from 0, takes the random numbers of `seed` + i.

    A `temperature` of 0 takes the likeliest token, 1 samples from the model's probabilities.
    `top_p` samples from the smallest set of tokens with this much probability.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1234

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the option, for what cannot be sampled from."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"--temperature ({self.temperature}) must be a number of at least 0; "
                "use 0 for the likeliest token or 1 for the model's own probabilities"
            )
        if not 0 <= self.top_p <= 1:
            raise ConfigError(
                f"--top-p ({self.top_p}) must be between 0 and 1; use 1 to sample from all tokens"
            )


@dataclass(frozen=True)
class GenerateRequest:
    """A checked request: token ids of each prompt, and the most tokens to add to each.

    `scoring` is the checkpoint in the wanted layout, with room for prompts and new tokens.
    """

    scoring: ScoreRequest
    tokenizer: Tokenizer
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling

    @classmethod
    def read(
        cls,
        checkpoint: Path,
        prompts: Sequence[str],
        overrides: Sequence[str] = (),
        world_size: int = 1,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        chat: bool = False,
    ) -> "GenerateRequest":
        """Check the arguments of `generate`, for `world_size` ranks; raise ConfigError.

        `max_new_tokens` None means `_DEFAULT_NEW_TOKENS`, fewer where the model has no room.
        """
        sampling = sampling or Sampling()
        for override in overrides:
            inference_override(override)
        folder = find_checkpoint(checkpoint)
        trained = load_config(folder / CONFIG_FILE)
        tokenizer = checkpoint_tokenizer(folder, trained)
        length = trained.model.seq_length
        template = ChatTemplate.find(folder, tokenizer, None) if chat else None
        ids = [_encode(tokenizer, prompt, length, template) for prompt in prompts]
        longest = max(len(tokens) for tokens in ids)
        room = length - longest
        if max_new_tokens is None:
            max_new_tokens = min(_DEFAULT_NEW_TOKENS, room)
        elif not 0 < max_new_tokens <= room:
            raise ConfigError(
                f"--max-new-tokens ({max_new_tokens}) must be between 1 and {room}: the longest "
                f"prompt has {longest} tokens and the model knows {length} positions; use {room}, "
                "or shorten the prompt"
            )
        texts = np.zeros((len(ids), divisible(longest + max_new_tokens, overrides)), np.int64)
        scoring = ScoreRequest.of(folder, trained, texts, overrides, world_size)
        return cls(scoring, tokenizer, ids, max_new_tokens, sampling)

    def run(self) -> list[str]:
        """Be this process's rank; prompt and continuation of each, on every rank."""
        with self.scoring.stages() as stages:
            from moepp_megatron.interop.scoring import continue_prompts

            new = continue_prompts(stages, self)
        pairs = zip(self.prompts, new, strict=True)
        return [self.tokenizer.decode(old + more) for old, more in pairs]


def _encode(
    tokenizer: Tokenizer, prompt: str, seq_length: int, template: ChatTemplate | None
) -> list[int]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--prompt ({prompt!r}) must be UTF-8 text; encode it so") from None
    if template is None:
        ids = tokenizer.encode(prompt)
    else:
        ids, _ = tokenizer.encode_with_spans(template.prompt(prompt), has_special_tokens=True)
    if not 0 < len(ids) < seq_length:
        raise ConfigError(
            f"--prompt ({len(ids)} tokens) must have between 1 and {seq_length - 1} tokens, one "
            f"less than model.seq_length ({seq_length}); shorten it or give it some text"
        )
    return ids


def generate(
    checkpoint: str | Path,
    prompts: str | Sequence[str],
    *overrides: str,
    max_new_tokens: int | None = None,
    temperature: float = Sampling.temperature,
    top_p: float = Sampling.top_p,
    seed: int = Sampling.seed,
    chat: bool = False,
) -> list[str]:
    """Continue texts with a checkpoint's model, as `moepp generate` does.

    Alone it computes in this process. In a script that torchrun or srun has started, every rank
    calls it, and `overrides` may lay the model out over the ranks.

    Args:
        checkpoint: A checkpoint folder or a run.
        prompts: A text to continue, or several.
        overrides: Settings `parallel.key=value` or `precision.key=value`.
        max_new_tokens: Tokens to add to each prompt at most; as `GenerateRequest.read`.
        temperature, top_p, seed: As in `Sampling`.
        chat: Prompts are messages of a user, rendered by the checkpoint's chat template.

    Returns:
        Prompt and continuation of each, in order.

    Raises:
        ConfigError: Whatever is wrong with the request.
    """
    quiet()
    world_size = RankEnvironment.read().world_size
    texts = [prompts] if isinstance(prompts, str) else prompts
    sampling = Sampling(temperature, top_p, seed)
    request = GenerateRequest.read(
        Path(checkpoint), texts, overrides, world_size, max_new_tokens, sampling, chat
    )
    for notice in request.scoring.notices:
        logger.warning("%s", notice)
    return request.run()
