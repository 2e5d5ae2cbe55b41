"""Texts from a checkpoint's model: what `moepp generate` does, for it and for Python."""

import logging
from collections.abc import Sequence
from pathlib import Path

from moepp_megatron.interop.generate_request import GenerateRequest, Sampling
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.runtime.rank_environment import prepare_rank

logger = logging.getLogger(__name__)


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
        temperature: Same as in `Sampling`.
        top_p: Same as in `Sampling`.
        seed: Same as in `Sampling`.
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
    return run(request)


def run(request: GenerateRequest) -> list[str]:
    """Be this process's rank; prompt and continuation of each, on every rank."""
    scoring, tokenizer = request.scoring, request.tokenizer
    rank = prepare_rank(scoring.config)
    from moepp_megatron.interop.decoding import continue_prompts
    from moepp_megatron.interop.scoring import scoring_stages
    from moepp_megatron.runtime import distributed

    with distributed.initialized(rank):
        distributed.build_groups(scoring.config, scoring.layout)
        new = continue_prompts(
            scoring_stages(scoring),
            scoring,
            request.prompts,
            request.max_new_tokens,
            request.sampling,
            eod=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
        )
    return [tokenizer.decode(old + more) for old, more in zip(request.prompts, new, strict=True)]
