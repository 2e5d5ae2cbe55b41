"""Micro-batches on this rank's device, for training and validation."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moepp_megatron.config import Config
from moepp_megatron.data.loader import batches, vocabulary_of
from moepp_megatron.data.samples import DOCUMENTS
from moepp_megatron.model.document_attention import dense_mask, document_ends, document_numbers
from moepp_megatron.runtime.optional import have_transformer_engine
from moepp_megatron.training.step import Batch, Batches


def rank_batches(dataset: Any, consumed_samples: int, config: Config, num_chunks: int) -> Batches:
    """Return one endless iterator per model chunk over this rank's micro-batches.

    They begin at `consumed_samples`. After the last whole global batch the first one follows again
    (of the last stage of the data), because a run that skipped bad batches needs others in their
    place. A sample depends only on its index, so the ranks of one replica agree without a
    broadcast.
    """
    return [_on_device(dataset, consumed_samples, config) for _ in range(num_chunks)]


def _on_device(dataset: Any, consumed_samples: int, config: Config) -> Iterator[Batch]:
    device = torch.cuda.current_device()
    # Given explicitly: without it the function would split sequences over all ranks.
    cp_group = parallel_state.get_context_parallel_group()
    packs = have_transformer_engine()
    for batch in _endless(dataset, consumed_samples, config):
        documents = _documents(dataset, batch) if config.data.reset_attention_mask else None
        if documents is not None and packs:
            batch["attention_mask"] = document_ends(documents)
        on_device = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        if documents is not None and not packs:
            on_device["attention_mask"] = dense_mask(documents.to(device, non_blocking=True))
        # Each context-parallel rank takes its two chunks of every sequence.
        yield get_batch_on_this_cp_rank(on_device, is_hybrid_cp=False, cp_group=cp_group)


def _documents(dataset: Any, batch: Batch) -> Tensor:
    """[b, s] document of each token, on the CPU."""
    if DOCUMENTS in batch:
        return batch[DOCUMENTS]
    tokens = batch["tokens"]
    tokenizer = getattr(getattr(dataset, "config", None), "tokenizer", None)
    # Made-up tokens have no tokenizer: each sequence is one document.
    return (
        torch.zeros_like(tokens) if tokenizer is None else document_numbers(tokens, tokenizer.eod)
    )


def sample_index(dataset: Any, number: int, config: Config) -> int:
    """Index of the sample that a run reads after `number` others."""
    batch = math.gcd(*config.training.batch_sizes)
    usable = len(dataset) // batch * batch
    assert usable > 0, f"{len(dataset)} samples do not fill a global batch of {batch}"
    first: int = getattr(dataset, "repeats_from", 0)
    return number if number < usable else first + (number - first) % (usable - first)


def _endless(dataset: Any, consumed_samples: int, config: Config) -> Iterator[Batch]:
    training = config.training
    # A step of a ramped run may end in the first batches, in every layout after the same sample.
    batch = math.gcd(*training.batch_sizes)
    start = sample_index(dataset, consumed_samples, config)
    # A loader with processes pins in a thread, which breaks a graph that is being captured.
    pins = torch.cuda.is_available() and not (config.data.num_workers and training.cuda_graphs)
    while True:
        yield from batches(
            dataset,
            start,
            training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            batch,
            num_workers=config.data.num_workers,
            pin_memory=pins,
            vocab_size=vocabulary_of(dataset, config.model.vocab_size),
        )
        start = getattr(dataset, "repeats_from", 0)
