"""Samples of text with the data source of each token, and of whole conversations.

Conversations: every document of the corpus is a sequence as long as a sample, with padding after
whole conversations, written by `prepare_chat`. An indexed dataset of bytes next to it (`marks`)
says what each token is.
"""

from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from moepp_megatron.config.blends import Folder
from moepp_megatron.data.manifest import DOCUMENT_SOURCES, Manifest
from moepp_megatron.data.verify import damaged

Batch = dict[str, torch.Tensor]
DOCUMENTS = "documents"
"""Key of a batch: [b, s] int64 number of each token's document in its sequence."""
PADDING = "padding_mask"
"""Key of a batch: [b, s] bool, True for padding, as megatron-core's models take it."""
SOURCES = "sources"
"""Key of a batch: [b, s] int32 data source of each token, an index into `source_names`."""

# Bits of a mark.
LEARNT = 1
FIRST = 2
PADDED = 4


class ConversationDataset(GPTDataset):
    """A `GPTDataset` whose samples are documents of the corpus, each with its marks.

    megatron-core's order, epochs and cache of indices are as for text: without an extra token, its
    samples are the documents, because those are as long.
    """

    marks: IndexedDataset | None = None

    def __getitem__(self, idx: int | None) -> Batch:
        """Return the sample; None gives one without loss, as in `GPTDataset`.

        `tokens`, `labels`, `position_ids` are int64 [s]; `loss_mask` is fp32 [s], 1 where the label
        is of the same conversation and an answer's; `DOCUMENTS` and `PADDING` are [s].
        """
        assert self.marks is not None, "datasets.py opens the marks"
        place = int(self.shuffle_index[0 if idx is None else idx])
        document = int(self.document_index[self.sample_index[place + 1][0]])
        tokens = torch.from_numpy(self.dataset.get(document).astype(np.int64))
        marks = torch.from_numpy(self.marks.get(document).astype(np.int64))
        begins = (marks & FIRST) > 0
        numbers = begins.cumsum(dim=0) - 1
        positions = torch.arange(len(tokens))
        if self.config.reset_position_ids:
            positions = positions - positions[begins][numbers]
        # No first token of a conversation is learnt, so none is the label of another's last.
        loss_mask = ((marks & LEARNT) > 0).roll(-1).float()
        if idx is None:
            loss_mask.zero_()
        return {
            "tokens": tokens,
            # The last label is the first token, which begins a conversation and has no loss.
            "labels": tokens.roll(-1),
            "loss_mask": loss_mask,
            "position_ids": positions,
            DOCUMENTS: numbers,
            PADDING: (marks & PADDED) > 0,
        }


def source_names(dataset: Any) -> tuple[str, ...]:
    """Names of the data sources that a dataset's samples distinguish; none where they do not."""
    return tuple(getattr(dataset, "source_names", ()))


class SourcedDataset(GPTDataset):
    """A `GPTDataset` whose samples say, under `SOURCES`, where each of their tokens comes from.

    Attributes:
        source_names: Names of the data sources, those of other folders of a blend among them.
        first_source: Index of the folder's first source among them.
        document_sources: [documents] uint8 data source of each document of the corpus, counted
            from the folder's first; None where all are of that one.
    """

    source_names: tuple[str, ...] = ()
    first_source: int = 0
    document_sources: NDArray[np.uint8] | None = None

    def __getitem__(self, idx: int | None) -> Batch:
        """The sample; None gives one of padding, as in `GPTDataset`."""
        sample: Batch = super().__getitem__(idx)
        length = self.config.sequence_length
        if self.document_sources is None:
            sample[SOURCES] = torch.full((length,), self.first_source, dtype=torch.int32)
            return sample
        documents, lengths = documents_of(self, 0 if idx is None else idx)
        of_tokens = np.repeat(self.document_sources[documents], lengths)
        # The last token of the sample is a label only.
        sample[SOURCES] = torch.from_numpy(of_tokens[:length].astype(np.int32) + self.first_source)
        return sample


def documents_of(dataset: GPTDataset, sample: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the documents that a sample and the one token after it are cut from, in order.

    The first array is [n] int64, documents as they are counted in `corpus.idx`; the second is [n]
    int64, tokens of each within that range.
    """
    place = int(dataset.shuffle_index[sample])
    (first, offset), (last, end) = dataset.sample_index[place : place + 2].tolist()
    documents = np.asarray(dataset.document_index[first : last + 1], dtype=np.int64)
    lengths = dataset.dataset.sequence_lengths[documents].astype(np.int64)
    lengths[-1] = end + 1
    lengths[0] -= offset
    return documents, lengths


def read_document_sources(folder: Folder, manifest: Manifest) -> NDArray[np.uint8] | None:
    """Return each document's data source, [documents] uint8; None if the folder does not say.

    Raises ConfigError if the file does not fit the manifest.
    """
    if DOCUMENT_SOURCES not in manifest.files:
        return None
    try:
        sources = np.load(folder.path / DOCUMENT_SOURCES, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise damaged(folder, f"{DOCUMENT_SOURCES}: {error}") from None
    number = len(manifest.source_names)
    fits = sources.shape == (manifest.documents,) and sources.dtype == np.uint8
    if not fits or int(sources.max(initial=0)) >= number:
        problem = f"{DOCUMENT_SOURCES} does not give each document one of {number} data sources"
        raise damaged(folder, problem)
    return np.asarray(sources)
