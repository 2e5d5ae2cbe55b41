"""Conversations as training samples: whole ones in each sequence, loss on answers, padding after.

Every document of the corpus is a sequence as long as a sample, written by `prepare_chat`. An
indexed dataset of bytes next to it (`marks`) says what each token is.
"""

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

DOCUMENTS = "documents"
"""Key of a batch: [b, s] int64 number of each token's document in its sequence."""
PADDING = "padding_mask"
"""Key of a batch: [b, s] bool, True for padding, as megatron-core's models take it."""

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

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """The sample; None gives one without loss, as in `GPTDataset`.

        Returns:
            `tokens`, `labels`, `position_ids`: int64 [s]; `loss_mask`: fp32 [s], 1 where the label
            is of the same conversation and an answer's; `DOCUMENTS` and `PADDING`: [s].
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
