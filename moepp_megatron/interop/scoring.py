"""Computes per-token log-probabilities of given sequences, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moepp_megatron.interop.score_request import ScoreRequest
from moepp_megatron.model.build import build_model
from moepp_megatron.model.stage import PipelineStage, evaluation_stages
from moepp_megatron.runtime.atomic import whole_file
from moepp_megatron.training.checkpoint import load_weights

Batch = dict[str, Tensor]
# Sequence, positions [s'], log-probabilities [s'] and logits [s', vocab] of a rank's tokens.
_Piece = tuple[int, np.ndarray, np.ndarray, np.ndarray | None]


def score_tokens(request: ScoreRequest) -> dict[str, np.ndarray] | None:
    """Score all sequences; every rank must call, and process groups must exist.

    Returns:
        The same as `score_stages`.
    """
    return score_stages(request, scoring_stages(request))


def scoring_stages(request: ScoreRequest) -> list[PipelineStage]:
    """This rank's part of the checkpoint's model, ready to score; every rank must call."""
    models = build_model(request.config)
    load_weights(request.checkpoint, models)
    return evaluation_stages(models, request.config)


@torch.no_grad()
def score_stages(
    request: ScoreRequest, stages: list[PipelineStage]
) -> dict[str, np.ndarray] | None:
    """Score all sequences with a model that is there; every rank must call.

    Each chunk reads this rank's sequences in order: micro-batch i is sequence
    `i * data-parallel size + data-parallel rank`, fillers behind them.

    Returns:
        On rank 0 `token_logprobs` [b, s-1] float64, the log-probability of each token after the
        first given those before it, and where wanted `logits` [b, s, vocab] fp32. None elsewhere.
    """
    batches = [_batches(request) for _ in stages]
    forward = get_forward_backward_func()
    pieces: list[_Piece] = forward(
        forward_step_func=partial(_forward_step, request.logits),
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=stages,
        num_microbatches=request.layout.num_microbatches,
        seq_length=request.config.model.seq_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    # Tensor-parallel ranks hold the same numbers; earlier stages hold none.
    mine = pieces if parallel_state.get_tensor_model_parallel_rank() == 0 else []
    return _assemble(request, mine or [])


def write_scores(out: Path, scores: dict[str, np.ndarray]) -> None:
    """Write the npz file; it appears complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **scores)  # type: ignore[arg-type]


def _batches(request: ScoreRequest) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches of one sequence; -1 marks a filler."""
    count, length = request.input_ids.shape
    padded = request.config.model.seq_length
    rank, size = parallel_state.get_data_parallel_rank(), request.layout.dp
    device = torch.cuda.current_device()
    cp_group = parallel_state.get_context_parallel_group()
    for step in range(request.layout.num_microbatches):
        sequence = step * size + rank
        tokens = torch.zeros(1, padded, dtype=torch.long)
        if sequence < count:
            tokens[0, :length] = torch.from_numpy(request.input_ids[sequence])
        batch = {
            "tokens": tokens,
            "labels": tokens.roll(-1, dims=1),
            "position_ids": torch.arange(padded).unsqueeze(0),
        }
        batch = {key: value.to(device) for key, value in batch.items()}
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
        batch["sequence"] = torch.tensor(sequence if sequence < count else -1)
        yield batch


def _forward_step(
    with_logits: bool, iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None)
    return output, partial(_piece, batch, with_logits)


def _piece(batch: Batch, with_logits: bool, output: Tensor, non_loss_data: bool = True) -> _Piece:
    """The results of the last stage for one micro-batch.

    Args:
        batch: The micro-batch.
        with_logits: Whether to keep the logits.
        output: [1, s', vocab / tp] logits of this rank's part of the vocabulary.
        non_loss_data: Argument of the schedule's call; unused.
    """
    logits = gather_from_tensor_model_parallel_region(output).float()[0]
    chosen = logits.gather(1, batch["labels"][0].unsqueeze(1)).squeeze(1)
    logprobs = chosen.double() - torch.logsumexp(logits.double(), dim=-1)
    return (
        int(batch["sequence"]),
        batch["position_ids"][0].cpu().numpy(),
        logprobs.cpu().numpy(),
        logits.cpu().numpy() if with_logits else None,
    )


def _assemble(request: ScoreRequest, mine: list[_Piece]) -> dict[str, np.ndarray] | None:
    """Bring the pieces of all ranks into place on rank 0."""
    everyone: list[Any] | None = None
    if dist.get_rank() == 0:
        everyone = [None] * dist.get_world_size()
    dist.gather_object(mine, everyone)
    if everyone is None:
        return None
    (count, length), padded = request.input_ids.shape, request.config.model.seq_length
    logprobs = np.full((count, padded), np.nan)
    shape = (count, padded, request.config.model.vocab_size)
    logits = np.full(shape, np.nan, dtype=np.float32) if request.logits else None
    for sequence, positions, values, rows in (piece for pieces in everyone for piece in pieces):
        if sequence < 0:
            continue
        logprobs[sequence, positions] = values
        if logits is not None:
            logits[sequence, positions] = rows
    scores = {"token_logprobs": logprobs[:, : length - 1]}
    if logits is not None:
        scores["logits"] = logits[:, :length]
    for name, values in scores.items():
        assert not np.isnan(values).any(), f"some {name} were computed by no rank, or are NaN"
    return scores
