"""Why batches were refused: found from losses and selections, without a model."""

import json
import math

import pytest
import torch

from moepp_megatron.training.parts.refused_batches import _find_cause, _has_moved
from moepp_megatron.training.resilience.numerical_guard import BatchEvidence, num_needed

SHARES = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
OTHER_SHARES = torch.tensor([[0.4, 0.2, 0.2, 0.2], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def batches(shares, losses, seed):
    """Batches of 4000 selections in each layer, drawn from the shares."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for loss in losses:
        drawn = torch.multinomial(shares, 4000, replacement=True, generator=generator)
        counts = torch.stack([torch.bincount(row, minlength=4) for row in drawn]).double()
        found.append(BatchEvidence(loss, counts))
    return found


def is_sound(loss):
    return loss < 4.0


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 3, 5])
def test_cause(seed, count):
    before = batches(SHARES, [3.0] * num_needed(count), seed)
    high = [7.0 + 0.1 * i for i in range(count)]
    refused = batches(OTHER_SHARES, high, seed + 100)
    assert _find_cause(refused, before, is_sound).cause == "data"
    # Routed as some of those before; a single one as they are on average, lest it be the oddest.
    known = [batch.selections_LE for batch in before[:count]] if count > 1 else [4000 * SHARES]
    same = [BatchEvidence(loss, routed) for loss, routed in zip(high, known, strict=True)]
    assert _find_cause(same, before, is_sound).cause == "targets"
    one_bad = [*batches(OTHER_SHARES, [math.nan], seed), *refused]
    assert _find_cause(one_bad, before, is_sound).cause == "not finite"


@pytest.mark.parametrize("losses", [[], [7.0] * 3, [math.nan] * 3, [3.0, math.nan, 7.0]])
def test_model_that_does_not_take_old_batches_is_damaged(losses):
    refused = batches(OTHER_SHARES, [7.0] * 3, 1)
    assert _find_cause(refused, batches(SHARES, losses, 2), is_sound).cause == "model"


def test_too_few_batches_never_count_as_moved():
    one, other = ([b.selections_LE for b in batches(s, [3.0], 1)] for s in (SHARES, OTHER_SHARES))
    assert [num_needed(count) for count in (1, 2, 3, 5, 9)] == [20, 10, 7, 5, 9]
    assert _has_moved(one * 20, other)
    assert not _has_moved(one * 19, other)


def test_state_is_restored_to_the_bit():
    for batch in batches(SHARES, [1 / 3, math.nan], 4):
        state = batch.state()
        # Saving compares the ranks' states, and NaN is not equal.
        assert state == json.loads(json.dumps(state))
        again = BatchEvidence.from_state(state)
        assert torch.equal(again.selections_LE, batch.selections_LE)
        assert again.loss == batch.loss or (math.isnan(again.loss) and math.isnan(batch.loss))
    # States of before.
    assert math.isnan(BatchEvidence.from_state([math.nan, [[1.0]]]).loss)
