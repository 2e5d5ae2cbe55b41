"""The contrast of hard and easy tokens on made tokens, whose answer is known."""

import numpy as np
import pytest

from benchmarks.hard_tokens import answers


@pytest.mark.parametrize("within", [0, 1], ids=["by id", "by loss"])
def test_a_loss_within_ids_is_separated_from_ids(within):
    chance = np.random.default_rng(0)
    ids = chance.integers(0, 40, size=(384, 18))
    noise = chance.normal(size=ids.shape)
    # Some ids are harder than others; FFN experts follow the id, or also the loss within it.
    ffn = ids // 10 + within * (noise > 0) + chance.integers(0, 2, size=ids.shape)
    found = answers(ffn, (ids + noise)[:, 1:], ids)
    everything, same = found["own, all, all"], found["own, all, id"]
    assert everything["gap"] > 2.5
    # Losses shuffled among the tokens of each id leave what ids explain.
    assert (abs(everything["gap"] - everything["shuffled in ids"][1]) < 0.05) == (within == 0)
    assert same["shuffled"][0] < 0 < same["shuffled"][1] < 0.2
    assert same["gap"] == pytest.approx(within, abs=0.05)
    # The next token's loss has nothing to do with it.
    assert found["next, all, id"]["gap"] == pytest.approx(0, abs=0.1)
