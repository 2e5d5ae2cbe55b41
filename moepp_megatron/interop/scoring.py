"""Computes per-token log-probabilities of given sequences, in any layout."""

from pathlib import Path

import numpy as np

from moepp_megatron.interop.score_request import ScoreRequest
from moepp_megatron.model.build import build_model
from moepp_megatron.model.stage import PipelineStage, evaluation_stages
from moepp_megatron.runtime.atomic import whole_file
from moepp_megatron.training.checkpoint.read import load_weights
from moepp_megatron.training.token_scores import Sequences, score_sequences


def score_tokens(request: ScoreRequest) -> dict[str, np.ndarray] | None:
    """`score_stages` of a model that is loaded; every rank must call, in process groups."""
    return score_stages(request, scoring_stages(request))


def scoring_stages(request: ScoreRequest) -> list[PipelineStage]:
    """This rank's part of the checkpoint's model, ready to score; every rank must call."""
    models = build_model(request.config)
    load_weights(request.checkpoint, models)
    return evaluation_stages(models, request.config)


def score_stages(
    request: ScoreRequest, stages: list[PipelineStage]
) -> dict[str, np.ndarray] | None:
    """Score all sequences with a model that is built; every rank must call.

    Returns:
        On rank 0 `token_logprobs` [b, s-1] float64, the log-probability of each token after the
        first given those before it, and where wanted `logits` [b, s, vocab] fp32. None elsewhere.
    """
    padded = request.config.model.seq_length
    scores = score_sequences(stages, Sequences(request.input_ids, padded, logits=request.logits))
    if scores is None:
        return None
    wanted = {"token_logprobs": scores["token_logprobs"][:, :-1]}
    if request.logits:
        wanted["logits"] = scores["logits"]
    for name, values in wanted.items():
        assert not np.isnan(values).any(), f"some {name} are no numbers"
    return wanted


def write_scores(out: Path, scores: dict[str, np.ndarray]) -> None:
    """Write the npz file; it appears complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **scores)  # type: ignore[arg-type]
