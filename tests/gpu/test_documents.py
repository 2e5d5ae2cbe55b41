"""Attention within documents with Transformer Engine itself: packed sequences of several."""

import pytest
import torch

from moepp_megatron.model.document_attention import document_ends
from tests.gpu.test_fp8 import BF16, SIZES
from tests.gpu.test_layer import relative_l2
from tests.te_stand_in.models import SEQUENCE, VOCAB, config_of, model_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("transformer_engine")]


def test_documents_of_a_sequence_are_as_each_by_itself():
    """Losses and gradients of all parameters, in bf16."""
    model = model_of(config_of(None, model=SIZES, data={"reset_attention_mask": True}))
    device = next(model.parameters()).device
    text = torch.randint(VOCAB, (1, SEQUENCE + 1), generator=torch.manual_seed(3))
    cut = SEQUENCE // 2 - 1

    def outcome(rows, documents):
        tokens = torch.zeros(len(rows), SEQUENCE + 1, dtype=torch.int64)
        padding = torch.ones(len(rows), SEQUENCE, dtype=torch.bool)
        for row, part in enumerate(rows):
            tokens[row, : part.shape[1]] = part
            padding[row, : part.shape[1] - 1] = False
        model.zero_grad()
        losses = model(
            tokens[:, :-1].contiguous().to(device),
            torch.arange(SEQUENCE, device=device).expand(len(rows), -1),
            document_ends(documents).to(device),
            labels=tokens[:, 1:].contiguous().to(device),
            padding_mask=padding.to(device),
        )[~padding.to(device)]
        losses.sum().backward()
        gradients = {name: each.grad.clone() for name, each in model.named_parameters()}
        return losses.detach().float(), gradients

    numbers = torch.arange(SEQUENCE)
    together = (numbers >= cut).long().unsqueeze(0)
    # The second document begins with a label of the first, which a sequence of it has too.
    rows = [text[:, : cut + 1], text[:, cut:]]
    alone = torch.stack([(numbers >= row.shape[1] - 1).long() for row in rows])
    found, gradients = outcome([text], together)
    expected, wanted = outcome(rows, alone)
    assert relative_l2(found, expected) < BF16
    # A gradient passes some ten products that each round by 2^-9, in sums of another order.
    for name, gradient in wanted.items():
        assert relative_l2(gradients[name], gradient) < 4 * BF16, name
