"""Draws a token from logits: greedy, or temperature and nucleus sampling (arXiv 1904.09751)."""

from __future__ import annotations

import torch
from megatron.core.inference.sampling import TorchSampling
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw a token.

    The generator's numbers are assigned to tokens in the order of their ids, so logits that differ
    in the last bits (another layout) give the same token, unless a draw falls into such a
    difference.

    Args:
        logits: [vocab] fp32 on the host, where the same generator gives the same numbers whatever
            device the model is on.
        temperature: 0 takes the largest logit, the first of equal ones; 1 samples from the model's
            probabilities.
        top_p: Sample from the smallest set of tokens with this much probability; 0 leaves the
            likeliest alone, 1 leaves all.
        generator: Source of randomness, on the host.
    """
    if temperature == 0 or top_p == 0:
        return int(logits.argmax())
    # Temperatures below fp32's smallest number would divide by 0; the largest logit is then 0 / t.
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    # For megatron-core 0 means no nucleus; 1 would cut off what rounds to more than 1.
    nucleus = top_p if top_p < 1 else 0.0
    row = (logits - logits.max()).unsqueeze(0)
    return int(TorchSampling.sample_from_logits(row, temperature, 0, nucleus, generator=generator))
