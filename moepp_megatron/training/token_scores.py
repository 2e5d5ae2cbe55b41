"""Log-probabilities of given tokens from a built model, in any layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moepp_megatron.config import Layout
from moepp_megatron.data.samples import Batch
from moepp_megatron.model.stage import PipelineStage

# Rows are as long as the next of its doublings, so that few lengths occur.
_SHORTEST = 32

# Sequence, positions [s'], and by name the values [s', ...] of a rank's tokens.
_Piece = tuple[int, np.ndarray, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Sequences:
    """Tokens to score.

    Attributes:
        input_ids: [b, s] int64.
        padded: Length that the layout divides, at least s; fillers come last.
        labels: [b, s] int64 the token to score after each position; by default the next one.
        micro_batch_size: Sequences of a forward pass.
        logits: Whether logits are wanted.
        only: [b] the only position of each that is wanted; None for all.
    """

    input_ids: np.ndarray
    padded: int
    labels: np.ndarray | None = None
    micro_batch_size: int = 1
    logits: bool = False
    only: np.ndarray | None = None

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of each data-parallel rank, fillers included."""
        replicas = parallel_state.get_data_parallel_world_size()
        count = -(-len(self.input_ids) // (replicas * self.micro_batch_size))
        # The interleaved schedule takes micro-batches in groups of one per pipeline rank.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return -(-count // stages) * stages


@torch.no_grad()
def score_sequences(
    stages: list[PipelineStage], sequences: Sequences
) -> dict[str, np.ndarray] | None:
    """Score all sequences; every rank must call, with the same sequences.

    Each chunk reads this rank's sequences in order: row j of micro-batch i is sequence
    `(i * data-parallel size + data-parallel rank) * micro-batch size + j`, fillers after them.

    Returns on rank 0 (None elsewhere) `token_logprobs` [b, s] float64, the log-probability of each
    label given the tokens up to its position; `is_likeliest` [b, s], 1 where no token is likelier;
    where wanted `logits` [b, s, vocab] fp32. With `only`, s is 1.
    """
    batches = [_batches(sequences) for _ in stages]
    forward = get_forward_backward_func()
    pieces: list[list[_Piece]] = forward(
        forward_step_func=partial(_forward_step, sequences),
        data_iterator=batches if len(batches) > 1 else batches[0],
        model=stages,
        num_microbatches=sequences.num_microbatches,
        seq_length=sequences.padded,
        micro_batch_size=sequences.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    # Tensor-parallel ranks hold the same numbers; earlier stages hold none.
    is_first = parallel_state.get_tensor_model_parallel_rank() == 0
    mine = [piece for batch in pieces or [] for piece in batch] if is_first else []
    return _assemble(sequences, mine)


def _batches(sequences: Sequences) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches; sequence -1 marks a filler."""
    (count, length), padded = sequences.input_ids.shape, sequences.padded
    size = sequences.micro_batch_size
    rank, replicas = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    device = torch.cuda.current_device()
    cp_group = parallel_state.get_context_parallel_group()
    for step in range(sequences.num_microbatches):
        first = (step * replicas + rank) * size
        numbers = [number if number < count else -1 for number in range(first, first + size)]
        rows = [number for number in numbers if number >= 0]
        tokens = torch.zeros(size, padded, dtype=torch.long)
        tokens[: len(rows), :length] = torch.from_numpy(sequences.input_ids[rows])
        labels = tokens.roll(-1, dims=1)
        if sequences.labels is not None:
            labels[: len(rows), :length] = torch.from_numpy(sequences.labels[rows])
        positions = torch.arange(padded).expand(size, -1).contiguous()
        batch = {"tokens": tokens, "labels": labels, "position_ids": positions}
        batch = {key: value.to(device) for key, value in batch.items()}
        batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
        batch["sequences"] = torch.tensor(numbers)
        yield batch


def _forward_step(
    sequences: Sequences, iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None)
    return output, partial(_pieces, batch, sequences)


def _pieces(
    batch: Batch, sequences: Sequences, output: Tensor, non_loss_data: bool = True
) -> list[_Piece]:
    """The results of the last stage for one micro-batch."""
    # output: [b, s', vocab / tp] logits of this rank's part of the vocabulary.
    whole = gather_from_tensor_model_parallel_region(output)
    pieces: list[_Piece] = []
    for row, sequence in enumerate(batch["sequences"].tolist()):
        if sequence < 0:
            continue
        positions, labels, logits = batch["position_ids"][row], batch["labels"][row], whole[row]
        if sequences.only is not None:
            wanted = positions == int(sequences.only[sequence])
            labels, logits = labels[wanted], logits[wanted]
            positions = torch.zeros_like(labels)
        logits = logits.float()
        chosen = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
        values = {
            "token_logprobs": chosen.double() - torch.logsumexp(logits.double(), dim=-1),
            "is_likeliest": logits.amax(dim=-1) == chosen,
        }
        if sequences.logits:
            values["logits"] = logits
        on_host = {name: value.cpu().numpy() for name, value in values.items()}
        pieces.append((sequence, positions.cpu().numpy(), on_host))
    return pieces


def _assemble(sequences: Sequences, mine: list[_Piece]) -> dict[str, np.ndarray] | None:
    """Bring the pieces of all ranks into place on rank 0."""
    everyone: list[Any] | None = None
    if dist.get_rank() == 0:
        everyone = [None] * dist.get_world_size()
    dist.gather_object(mine, everyone)
    if everyone is None:
        return None
    (count, length), padded = sequences.input_ids.shape, sequences.padded
    if sequences.only is not None:
        padded = 1
    scores: dict[str, np.ndarray] = {}
    seen = np.zeros((count, padded), dtype=bool)
    for sequence, positions, values in (piece for pieces in everyone for piece in pieces):
        for name, value in values.items():
            if name not in scores:
                scores[name] = np.zeros((count, padded, *value.shape[1:]), dtype=value.dtype)
            scores[name][sequence, positions] = value
        seen[sequence, positions] = True
    assert seen.all(), "some tokens were scored by no rank"
    return {name: values[:, :length] for name, values in scores.items()}


def padded_length(length: int, layout: Layout, most: int) -> int:
    """The shortest of a few lengths, at most `most`, that the layout divides."""
    padded = _SHORTEST * layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    while padded < length:
        padded *= 2
    return min(padded, most)
