"""Documents that share sequences, with padding, are as each by itself."""

from functools import partial

import numpy as np
import pytest

from tests.parallel.training_runs import (
    LATENT,
    STEPS,
    SyntheticDataset,
    begin,
    losses_and_gradients,
    settings,
)

# fp32 sums in another order: a few units in the last place (6e-8) of the largest summand.
RELATIVE = 1e-5
DATA = {"reset_attention_mask": True}


LENGTHS = (20, 25)
LENGTH = 48


def two_documents(config, is_packed):
    """In one sequence or in one each, with padding behind."""
    import torch

    from moepp_megatron.model.document_attention import dense_mask

    generator = torch.manual_seed(5)
    texts = [torch.randint(config.model.vocab_size, (n + 1,), generator=generator) for n in LENGTHS]
    rows = [texts] if is_packed else [[text] for text in texts]
    tokens, labels, documents = (torch.zeros(len(rows), LENGTH, dtype=torch.int64) for _ in "123")
    padding = torch.ones(len(rows), LENGTH, dtype=torch.bool)
    for row, own in enumerate(rows):
        start = 0
        for number, text in enumerate(own):
            where = row, slice(start, start + len(text) - 1)
            tokens[where], labels[where], padding[where] = text[:-1], text[1:], False
            documents[where] = number + 1
            start = where[1].stop
    batch = {"input_ids": tokens, "attention_mask": dense_mask(documents), "labels": labels}
    return batch | {"padding_mask": padding}, ~padding


@pytest.mark.parametrize("model", [{}, LATENT | {"qk_layernorm": False}], ids=["plain", "latent"])
def test_documents_of_a_sequence_are_as_each_by_itself(ranks, model):
    """Losses and gradients, those of balance loss and z-loss included."""
    moe = {"balance_coeff": 0.1, "z_loss_coeff": 0.1}
    raw = settings(moe=moe, model={"seq_length": LENGTH, **model})
    packed, alone = (
        ranks(1).run(losses_and_gradients, raw, partial(two_documents, is_packed=is_packed))[0]
        for is_packed in (True, False)
    )
    assert packed.keys() == alone.keys()
    for name, expected in alone.items():
        apart = np.abs(packed[name] - expected).max()
        assert apart <= RELATIVE * np.abs(expected).max(), name
        # A few tokens do not reach every expert.
        assert expected.any() or ".local_experts." in name, f"{name} compares nothing"


def masks_of_text(raw, eod):
    """Tokens and mask of the first micro-batch of plain text, where a tokenizer ends documents."""
    from types import SimpleNamespace

    from moepp_megatron.training.batches import rank_batches

    class Text(SyntheticDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return {key: value for key, value in sample.items() if key != "documents"}

    config, _ = begin(raw)
    dataset = Text(config, STEPS)
    if eod is not None:
        dataset.config = SimpleNamespace(tokenizer=SimpleNamespace(eod=eod))
    batch = next(rank_batches(dataset, 0, config, 1)[0])
    return batch["tokens"].numpy(), batch["attention_mask"].numpy()


@pytest.mark.parametrize("eod", [None, 10])
def test_text_is_masked_as_by_megatron_cores_dataset(on_one_rank, eod):
    import torch
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    tokens, masks = on_one_rank(masks_of_text, settings(data=DATA), eod)
    resets = eod is not None
    assert not resets or (tokens == eod).any()
    for row, mask in zip(torch.from_numpy(tokens), masks, strict=True):
        expected, *_ = _get_ltor_masks_and_position_ids(row, eod, False, resets, False, True)
        assert np.array_equal(mask, expected.numpy())
