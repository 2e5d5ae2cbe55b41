"""Checks samples for tokens outside the vocabulary, before they reach an embedding.

In the embedding such a token would be an IndexError on every rank of a CPU run, and a device assert
on a GPU that names neither file nor sample.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from moepp_megatron.config.blends import Folder
from moepp_megatron.data.blending import DrawnDataset
from moepp_megatron.data.document_sources import documents_of
from moepp_megatron.data.manifest import CORPUS
from moepp_megatron.data.verify import damaged, outside


def vocabulary_of(dataset: Any, model_vocab_size: int) -> int:
    """The upper limit of a dataset's token ids.

    It is the size of its tokenizer's vocabulary, which is stricter than the model's: it also finds
    damage that the model could read. Datasets that are not from `build_datasets` have no
    tokenizer, so the model's size is used.
    """
    if isinstance(dataset, GPTDataset | DrawnDataset):
        return min(int(dataset.config.tokenizer.vocab_size), model_vocab_size)
    return model_vocab_size


def check_tokens(
    dataset: Any, indices: Sequence[int], batch: Mapping[str, torch.Tensor], vocab_size: int
) -> None:
    """Check `tokens` and, if they are there, `labels` of a batch, int64 [b, s], on the host.

    Raises:
        ConfigError: if one is not; for a dataset of `build_datasets` it names folder, document and
            token.
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
    document, offset = _locate(dataset, sample, position)
    prefix = Path(dataset.dataset.path_prefix)
    folder = Folder("data.path", prefix.parent if prefix.name == CORPUS else prefix)
    place = f"token {offset} of document {document}"
    return damaged(getattr(dataset, "setting", folder), outside(place, token, vocab_size))


def _locate(dataset: GPTDataset, sample: int, position: int) -> tuple[int, int]:
    """The document of the corpus that a sample's token is in, and which of its tokens it is."""
    documents, lengths = documents_of(dataset, sample)
    ends = np.cumsum(lengths)
    index = int(np.searchsorted(ends, position, side="right"))
    if index > 0:
        return int(documents[index]), position - int(ends[index - 1])
    _, offset = dataset.sample_index[dataset.shuffle_index[sample]]
    return int(documents[0]), position + int(offset)
