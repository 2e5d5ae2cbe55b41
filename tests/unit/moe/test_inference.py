"""Cached inference of megatron-core with the model's layers."""

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from moepp_megatron.moe.config import MoEPPConfig
from tests.unit.moe.builders import SEQUENCE, VOCAB, build_model


def test_logits_with_a_cache_are_those_without():
    model = build_model(MoEPPConfig(4)).eval()
    tokens = torch.randint(VOCAB, (2, SEQUENCE))
    positions = torch.arange(SEQUENCE).expand(2, -1)
    with torch.no_grad():
        expected = model(tokens, positions, None)
        context = StaticInferenceContext(2, SEQUENCE)
        split = SEQUENCE - 2
        found = [model(tokens[:, :split], positions[:, :split], None, inference_context=context)]
        for at in range(split, SEQUENCE):
            context.sequence_len_offset = at
            one = slice(at, at + 1)
            found.append(model(tokens[:, one], positions[:, one], None, inference_context=context))
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
