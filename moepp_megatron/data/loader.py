"""Micro-batches in an order that depends on nothing but the number of samples consumed.

Tokens outside of the vocabulary are refused before they reach an embedding, where they would be an
IndexError on every rank of a CPU run, and a device assert on a GPU that names neither file nor
sample.
"""

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import DataLoader, Dataset, Sampler

from moepp_megatron.config.blends import Folder
from moepp_megatron.config.errors import UnfitError
from moepp_megatron.data.blending import DrawnDataset
from moepp_megatron.data.manifest import CORPUS
from moepp_megatron.data.samples import Batch, documents_of
from moepp_megatron.data.verify import damaged, outside
from moepp_megatron.runtime.disk import NO_SPACE, free_bytes, is_full

_SHARED_MEMORY = Path("/dev/shm")
# Some ten locks, a page each.
_BYTES_A_WORKER = 64 * 1024


class _MicroBatches(Sampler[list[int]]):
    """Sample indices of micro-batches, from the first of each."""

    def __init__(self, firsts: range, size: int) -> None:
        self._firsts, self._size = firsts, size

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self._firsts)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each."""
        return (list(range(first, first + self._size)) for first in self._firsts)


def batches(
    dataset: "Dataset[Any]",
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    global_batch_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """Iterate over the micro-batches of one data-parallel rank.

    `global_batch_size / (micro_batch_size * dp_size)` consecutive ones form an optimizer step;
    sizes are in samples, and the global one is over all ranks.

    Args:
        dataset: one of `build_datasets`.
        consumed_samples: samples consumed by all ranks so far; iteration starts right after them.
        num_workers: processes that read ahead; 0 reads in this one. The order is the same.
        pin_memory: put the batches into pinned memory (needs a GPU).
        vocab_size: token ids must be below it; None leaves them unchecked.

    Yields:
        `tokens`, `labels`, `position_ids`: int64 [b, s]; `loss_mask`: float32 [b, s]; all on the
        CPU; of conversations also `DOCUMENTS` and `PADDING` (`samples.py`).
        It ends before a global batch the dataset cannot fill.

    Raises:
        ConfigError: while iterating, a token outside of the vocabulary (`check_tokens`).
        UnfitError: while iterating, shared memory has no room for the processes.
    """
    # Micro-batch m of rank r in the global batch that starts at sample S holds the samples
    # `S + (m * dp_size + r) * micro_batch_size + [0, micro_batch_size)`: the order of Megatron-LM's
    # `MegatronPretrainingSampler`. All ranks together thus read the same samples in the same order
    # whatever `dp_size` is. A last global batch that would be incomplete is left out.
    stride = micro_batch_size * dp_size
    fits = consumed_samples >= 0 <= dp_rank < dp_size and stride > 0 == global_batch_size % stride
    assert fits, f"{dp_size} ranks of {micro_batch_size} samples do not fill {global_batch_size}"
    unread = max(len(dataset) - consumed_samples, 0)  # type: ignore[arg-type]  # has a length
    end = consumed_samples + unread // global_batch_size * global_batch_size
    firsts = range(consumed_samples + dp_rank * micro_batch_size, end, stride)
    sampler = _MicroBatches(firsts, micro_batch_size)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Without its own, every iterator would draw a number from the global generator, and
        # an evaluation or a resume would change dropout and initialization after it.
        generator=torch.Generator(),
    )
    loaded = iter(loader) if num_workers == 0 else _read_ahead(loader)
    return loaded if vocab_size is None else _checked(loaded, sampler, dataset, vocab_size)


def _read_ahead(loader: "DataLoader[Batch]") -> Iterator[Batch]:
    """The batches of a loader that has processes, which use shared memory."""
    try:
        # Of locks and queues: torch prints a traceback where it fails to make one.
        if free_bytes(_SHARED_MEMORY) < _BYTES_A_WORKER * (1 + loader.num_workers):
            raise OSError(errno.ENOSPC, NO_SPACE)
        yield from loader
    except (OSError, RuntimeError) as error:
        # torch: a process that writes where there is no room is ended by a bus error.
        if not is_full(error) and "shared memory" not in str(error):
            raise
        raise UnfitError(
            f"data.num_workers ({loader.num_workers}) needs more shared memory than /dev/shm has "
            "room for; make it larger (docker run --shm-size), or use data.num_workers=0"
        ) from error


def _checked(
    loaded: Iterator[Batch], sampler: _MicroBatches, dataset: "Dataset[Any]", vocab_size: int
) -> Iterator[Batch]:
    # Here and not in the loader's processes, whose errors come with a traceback as their text.
    for indices, batch in zip(sampler, loaded, strict=True):
        check_tokens(dataset, indices, batch, vocab_size)
        yield batch


def vocabulary_of(dataset: Any, model_vocab_size: int) -> int:
    """The upper limit of a dataset's token ids.

    That is the size of its tokenizer's vocabulary: it also finds damage that the model could read.
    Datasets that are not from `build_datasets` have no tokenizer; the model's size is used.
    """
    if isinstance(dataset, GPTDataset | DrawnDataset):
        return min(int(dataset.config.tokenizer.vocab_size), model_vocab_size)
    return model_vocab_size


def check_tokens(dataset: Any, indices: Sequence[int], batch: Batch, vocab_size: int) -> None:
    """Check `tokens` and, if they are there, `labels` of a batch, int64 [b, s], on the host.

    For an id outside of the vocabulary a dataset of `build_datasets` raises ConfigError, which
    names folder, document and token; any other raises ValueError, which names the sample.
    """
    for shift, name in enumerate(("tokens", "labels")):
        tokens = batch.get(name)
        if tokens is None:
            continue
        lowest, highest = torch.aminmax(tokens)
        if lowest >= 0 and highest < vocab_size:
            continue
        row, column = ((tokens < 0) | (tokens >= vocab_size)).nonzero()[0].tolist()
        token = int(tokens[row, column])
        # A label is the token after the one in its place.
        raise _error(dataset, indices[row], column + shift, token, vocab_size)


def _error(dataset: Any, sample: int, position: int, token: int, vocab_size: int) -> Exception:
    if isinstance(dataset, DrawnDataset):
        dataset, sample = dataset.locate(sample)
    if not isinstance(dataset, GPTDataset):
        return ValueError(outside(f"token {position} of sample {sample}", token, vocab_size))
    documents, lengths = documents_of(dataset, sample)
    # A sample begins within its first document.
    skipped = int(dataset.sample_index[dataset.shuffle_index[sample]][1])
    lengths[0] += skipped
    position += skipped
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, position, side="right"))
    offset = position - int(ends[index] - lengths[index])
    prefix = Path(dataset.dataset.path_prefix)
    folder = Folder("data.path", prefix.parent if prefix.name == CORPUS else prefix)
    place = f"token {offset} of document {documents[index]}"
    return damaged(getattr(dataset, "setting", folder), outside(place, token, vocab_size))
