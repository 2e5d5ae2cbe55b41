"""Temperature and nucleus sampling against probabilities worked out by hand."""

import math
from collections import Counter

import pytest
import torch

from moepp_megatron.interop.generate import Sampling
from moepp_megatron.interop.scoring import _sample
from tests.refusals import config_error

PROBABILITIES = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0
DRAWS = 4000


def draws(temperature, top_p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Counter(_sample(LOGITS, Sampling(temperature, top_p), generator) for _ in range(DRAWS))


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        # Squares of the probabilities, over their sum 0.3.
        (0.5, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        # 0.4 alone is not enough, 0.4 + 0.3 is.
        (1.0, 0.6, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 0.75, [0, 4 / 9, 2 / 9, 3 / 9]),
        (1.0, 0.3, [0, 1, 0, 0]),
        (1.0, 0.0, [0, 1, 0, 0]),
        (0.0, 1.0, [0, 1, 0, 0]),
        (1e-50, 1.0, [0, 1, 0, 0]),
        (1e30, 1.0, [0.25] * 4),
    ],
)
def test_shares_of_draws(temperature, top_p, expected):
    counts = draws(temperature, top_p)
    for token, share in enumerate(expected):
        # Five standard deviations of a binomial share.
        deviation = 5 * math.sqrt(share * (1 - share) / DRAWS)
        assert abs(counts[token] / DRAWS - share) <= deviation, (token, counts)


def test_last_bits_do_not_reorder_the_draws():
    """Equal logits that another layout has a bit apart, in another order, give the same tokens."""
    vocab = 512
    noise = torch.rand(vocab, generator=torch.Generator().manual_seed(1)) * 1e-6
    tokens = []
    for logits in (torch.zeros(vocab), noise, -noise):
        generator = torch.Generator().manual_seed(4)
        tokens.append([_sample(logits, Sampling(1.0, 1.0), generator) for _ in range(200)])
    assert tokens[0] == tokens[1] == tokens[2]
    assert len(set(tokens[0])) > 100


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": math.nan}, r"--temperature \(nan\) must be a number of at least 0"),
        ({"temperature": math.inf}, r"--temperature \(inf\)"),
        ({"temperature": -1.0}, r"--temperature \(-1.0\)"),
        ({"top_p": math.nan}, r"--top-p \(nan\) must be between 0 and 1"),
        ({"top_p": 1.5}, r"--top-p \(1.5\)"),
    ],
)
def test_settings_that_cannot_be_sampled_from(settings, named):
    with config_error(named):
        Sampling(**settings)  # type: ignore[arg-type]
