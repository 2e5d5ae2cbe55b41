"""Scores tokens or a text, for `moepp score` and for callers from Python."""

import logging
from pathlib import Path

import numpy as np

from moepp_megatron.interop.score_request import ScoreRequest, read_input_ids
from moepp_megatron.runtime.atomic import whole_file
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment
from moepp_megatron.runtime.rank_environment import prepare_rank

logger = logging.getLogger(__name__)


def score(
    checkpoint: str | Path,
    *overrides: str,
    tokens: str | Path | np.ndarray | None = None,
    text: str | Path | None = None,
    out: str | Path | None = None,
    logits: bool = False,
) -> dict[str, np.ndarray] | None:
    """Score given tokens, or a text, with a checkpoint's model, as `moepp score` does.

    Computes in this process; in a script that torchrun or srun has started, every rank calls it,
    and `overrides` may lay the model out over the ranks.

    Args:
        checkpoint: A checkpoint folder or a run.
        overrides: Settings `parallel.key=value` or `precision.key=value`.
        tokens: Whole numbers [b, s], or an npz file with them as `input_ids`.
        text: A UTF-8 text file instead, cut into windows (`TextWindows`).
        out: File to write the result to.
        logits: Whether logits are wanted; not of a text.

    Returns:
        On rank 0, None elsewhere: `token_logprobs` [b, s-1] float64, natural logarithms, and where
        wanted `logits` [b, s, vocab] fp32. Of a text with N tokens `token_ids` [N] int64 and
        `token_logprobs` [N] float64.

    Raises:
        ConfigError: Whatever is wrong with the request.
    """
    quiet()
    given = tokens if tokens is None or isinstance(tokens, np.ndarray) else read_input_ids(tokens)
    places = [None if path is None else Path(path) for path in (out, text)]
    world_size = RankEnvironment.read().world_size
    request = ScoreRequest.read(
        Path(checkpoint), given, places[0], overrides, world_size, logits, places[1]
    )
    for notice in request.notices:
        logger.warning("%s", notice)
    return run(request)


def run(request: ScoreRequest) -> dict[str, np.ndarray] | None:
    """Be this process's rank; returns, and writes, the same as `score`."""
    rank = prepare_rank(request.config)
    from moepp_megatron.interop.scoring import score_stages, scoring_stages
    from moepp_megatron.runtime import distributed

    with distributed.initialized(rank):
        distributed.build_groups(request.config, request.layout)
        scores = score_stages(request, scoring_stages(request))
    if scores is None:
        return None
    if request.text is not None:
        logprobs = request.text.token_logprobs(scores["token_logprobs"])
        scores = {"token_ids": request.text.token_ids, "token_logprobs": logprobs}
    if request.out is not None:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(request.out) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **scores)  # type: ignore[arg-type]
    return scores
