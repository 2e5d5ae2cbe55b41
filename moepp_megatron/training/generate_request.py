"""What `moepp generate` is asked to do, checked before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moepp_megatron.config import Config, ConfigError, Layout, load_config, with_overrides
from moepp_megatron.config.stages import virtual_stages
from moepp_megatron.data.chat_template import ChatTemplate
from moepp_megatron.data.tokenizer import Tokenizer
from moepp_megatron.file_names import CONFIG_FILE, TOKENIZER_FILE
from moepp_megatron.training.checkpoint import find_checkpoint
from moepp_megatron.training.inference_settings import FORWARD_ONLY, inference_override

_DEFAULT_NEW_TOKENS = 96


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token, 1 samples from the model's probabilities.
        top_p: Sample from the smallest set of tokens with this much probability.
        seed: Prompt number i, from 0, is continued with the random numbers of `seed` + i.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 1234

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled from.

        Raises:
            ConfigError: Naming the option.
        """
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
    """A checked request.

    Attributes:
        checkpoint: The checkpoint's folder.
        config: Its configuration in the wanted layout.
        layout: The rank grid. Data-parallel ranks all do the same.
        tokenizer: The checkpoint's own.
        prompts: Token ids of each prompt.
        max_new_tokens: Tokens to add to each prompt at most.
        sampling: How they are drawn.
        notices: What the user should know.
    """

    checkpoint: Path
    config: Config
    layout: Layout
    tokenizer: Tokenizer
    prompts: list[list[int]]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    notices: list[str] = field(default_factory=list)

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
    ) -> GenerateRequest:
        """Check a request.

        Args:
            checkpoint: A checkpoint folder or a run.
            prompts: Texts to continue, at least one.
            overrides: Settings `parallel.key=value` or `precision.key=value`.
            world_size: Ranks.
            max_new_tokens: None means `_DEFAULT_NEW_TOKENS`, fewer where the model has no room.
            sampling: How tokens are drawn.
            chat: Whether prompts are messages, rendered by the checkpoint's chat template.

        Raises:
            ConfigError: If the request is wrong.
        """
        sampling = sampling or Sampling()
        _check_overrides(overrides)
        folder = find_checkpoint(checkpoint)
        trained = load_config(folder / CONFIG_FILE)
        tokenizer = checkpoint_tokenizer(folder, trained)
        length = trained.model.seq_length
        template = ChatTemplate.find(folder, tokenizer, None) if chat else None
        ids = [_encode(tokenizer, prompt, length, template) for prompt in prompts]
        room = trained.model.seq_length - max(len(tokens) for tokens in ids)
        if max_new_tokens is None:
            max_new_tokens = min(_DEFAULT_NEW_TOKENS, room)
        elif max_new_tokens > room:
            raise ConfigError(
                f"--max-new-tokens ({max_new_tokens}) must be at most {room}: the longest prompt "
                f"has {trained.model.seq_length - room} tokens and the model knows "
                f"{trained.model.seq_length} positions; use {room}, or shorten the prompt"
            )
        config = generation_config(trained, overrides, world_size)
        layout = Layout.from_config(config, world_size)
        notices = list(_notices(trained))
        return cls(folder, config, layout, tokenizer, ids, max_new_tokens, sampling, notices)


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, value = inference_override(override)
        if key == "context_parallel_size" and value != 1:
            raise ConfigError(
                f"parallel.context_parallel_size ({value}) must be 1 for moepp generate: no "
                "cache of keys and values is spread over ranks; leave it out, or use "
                "parallel.tensor_model_parallel_size"
            )
        if key.startswith("fp8") and value not in (None, False):
            raise ConfigError(
                f"precision.{key} ({value}) must be null for moepp generate: FP8 needs more tokens "
                "at once than decoding has; leave it out"
            )


def checkpoint_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer that a checkpoint keeps.

    Args:
        folder: The checkpoint's folder.
        config: Its configuration.

    Raises:
        ConfigError: It has none, or one with more tokens than the model.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"checkpoint ({folder}) must hold {TOKENIZER_FILE} to turn text into tokens, and the "
            "model it was converted from had none; copy the model's tokenizer.json there"
        )
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{folder / TOKENIZER_FILE} ({tokenizer.vocab_size} tokens) must not have more than "
            f"model.vocab_size ({config.model.vocab_size}) of the checkpoint; put the tokenizer "
            "there that the model was trained with"
        )
    return tokenizer


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


def generation_config(trained: Config, overrides: Sequence[str], world_size: int) -> Config:
    """A checkpoint's configuration in the wanted layout, for a model that generates.

    Raises:
        ConfigError: The layout does not fit, or cannot generate.
    """
    # One sequence per data-parallel rank, which the check of the rank grid asks for. For sequence
    # parallelism see below.
    fixed = ("training.global_batch_size=1", "parallel.sequence_parallel=true")
    config = with_overrides(trained, [*FORWARD_ONLY, *overrides, *fixed])
    parallel = config.parallel
    if virtual_stages(config) > 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size ({virtual_stages(config)}) must be "
            "null for moepp generate: megatron-core's inference has no interleaved schedule; leave "
            "it out, or give one stage a pipeline rank"
        )
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    replicas = max(1, world_size // model_ranks)
    config = with_overrides(config, [f"training.global_batch_size={replicas}"])
    Layout.from_config(config, world_size)
    # Training has to split sequences over tensor-parallel ranks; a single new token cannot be
    # split. Set after the check, which speaks for training.
    whole = config.parallel.model_copy(update={"sequence_parallel": False})
    return config.model_copy(update={"parallel": whole})


def _notices(trained: Config) -> Iterator[str]:
    if trained.moe.capacity_factor is not None:
        yield "moe.capacity_factor is ignored: no selection is dropped when generating"
    if trained.precision.fp8 is not None:
        yield f"precision.fp8 is ignored: the model generates in {trained.precision.dtype}"
