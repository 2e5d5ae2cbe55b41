"""Every layout trains what one process trains: the layout matrix."""

import dataclasses
from itertools import combinations, product

import pytest

from tests.parallel.layouts import ROUTINGS, parse_cells, reference_settings, run_settings
from tests.parallel.matrix_cells import CORNERS, DEDUP, FAST, PAIRS
from tests.parallel.training_runs import (
    STEPS,
    compare,
    difference,
)

LONG = 5

# fp32 rounds by 6e-8. Layouts add up the same numbers in another order, and five steps of Adam
# carry that on: the largest difference measured over all cells is 2.3e-6, of a gradient.
FP32 = 1e-5

# bf16 rounds by 2^-9, and one rounding that tips a selection moves a whole token. A cell may differ
# from one process as two runs differ whose rounding is independent. How far only rounding takes a
# run is measured in the same test: bf16 against fp32, both on one process. Tensor-parallel ranks
# round partial sums on top, up to twice the roundings: sqrt(1 + 2^2) = 2.2 of that distance, give
# or take the few tokens that a selection moves. Measured over all bf16 cells: 2.1 at most, and 0 to
# 0.03 where no arithmetic differs (pipeline, data and expert parallelism).
BF16_DISTANCES = 3.0
# A loss is a mean of about 5 over token losses whose logits, up to 8 in size, are rounded by
# 8 * 2^-9 = 2^-6 once: relative to the loss 2^-8, and twice that for two runs. That holds in the
# first step, where weights are equal; measured in three cells: 0.0015 at most. Later steps carry on
# what Adam and tipped selections made of it: there a loss may also differ as all else does, by the
# measured distance. Measured: 2.3 of it where tensor-parallel ranks round partial sums.
BF16_LOSS = 2**-7


@pytest.mark.parametrize("cell", FAST, ids=str)
def test_fast_layout(cell, trained, alone, record_property):
    check(cell, STEPS, trained, alone, record_property)


@pytest.mark.matrix
@pytest.mark.parametrize("cell", [*PAIRS, *CORNERS, *DEDUP], ids=str)
def test_layout(cell, trained, alone, record_property):
    check(cell, LONG, trained, alone, record_property)


def check(cell, steps, trained, alone, record_property):
    """Train the cell and its reference; `--junitxml` holds the differences."""

    def pair(cell):
        raw = learning(run_settings(cell), steps)
        routing = ROUTINGS[cell.routing]
        run = trained(cell.ranks, raw, steps, routing)
        return run, alone(learning(reference_settings(cell), steps), routing, steps)

    run, expected = pair(cell)
    found = difference(run, expected)
    record_property("loss", found.loss)
    record_property("gradient", found.gradient if cell.dtype == "fp32" else found.all_gradients)
    exact = (run, expected)
    if cell.dtype == "bf16":
        # Rounding hides what is small, such as a gradient of norms that is not reduced.
        exact = pair(dataclasses.replace(cell, dtype="fp32"))
        first = abs(run.losses[0] / expected.losses[0] - 1)
        assert first < BF16_LOSS, (first, found)
        check_bf16(found, difference(expected, exact[1]))
    compare(*exact, FP32)
    check_routing(cell, run)


def learning(raw, steps):
    """Without warm-up where the first of few steps has to change weights."""
    return raw if steps == LONG else {**raw, "optimizer": {**raw["optimizer"], "warmup_iters": 0}}


def check_bf16(found, rounding):
    """Hold the differences of a bf16 run against what rounding by itself does."""
    assert found.loss < max(BF16_LOSS, BF16_DISTANCES * rounding.loss), (found, rounding)
    assert found.all_gradients < BF16_DISTANCES * rounding.all_gradients, (found, rounding)
    # Norms differ by no more than the vectors do.
    assert found.grad_norm < BF16_DISTANCES * rounding.all_gradients, (found, rounding)
    assert found.selections <= BF16_DISTANCES * rounding.selections, (found, rounding)


def check_routing(cell, run):
    """The routing that a corner case is named after is the one that happened."""
    for metrics in run.routing:
        if cell.routing == "no FFN token":
            assert metrics["ffn_fraction"] == 0
        elif cell.routing == "one FFN expert":
            assert all(share[0] == 0.5 for share in metrics["layer_expert_share"])
        elif cell.routing == "half of the FFN experts":
            assert all(sum(share[4:8]) == 0 for share in metrics["layer_expert_share"])
        elif cell.routing == "no FFN token in half of the sequence":
            assert 0 < metrics["ffn_fraction"] <= 0.5


# ---- the tables themselves --------------------------------------------------------------

OPTIONS = {
    "dp": (1, 2, 4, 8),
    "tp": (1, 2),
    "pp": (1, 2, 4),
    "stages": ("even", "interleaved", "uneven", "ends apart", "uneven interleaved"),
    "ep": (1, 2, 4, 8),
    "etp": (1, 2),
    "cp": (1, 2),
    "optimizer": ("whole", "distributed", "overlap reduce", "overlap both"),
    "micro_batches": (1, 2, 4),
    "recompute": ("none", "uniform", "block", "moe"),
    "dispatcher": ("alltoall", "alltoall_dedup", "allgather"),
    "gates": ("none", "selected", "nonzero"),
    "scope": ("microbatch", "sequence", "global"),
    "layers": ("moe", "mixed"),
    "router": ("residual", "no residual", "two layers", "vanilla"),
    "capacity": (False, True),
    "dtype": ("fp32", "bf16"),
    "extras": ("", "gqa", "tied", "z loss", "shared"),
}


def is_impossible(one, value, other, other_value):
    """True if two option values cannot meet on 8 ranks with a global batch of 8 sequences."""
    pair = {one: value, other: other_value}
    divided = ("uneven", "ends apart", "interleaved", "uneven interleaved")
    # Divided stages need two pipeline ranks at least.
    pp = pair.get("pp", 2 if pair.get("stages") in divided else 1)
    ranks = pp * pair.get("dp", 1) * pair.get("tp", 1) * pair.get("cp", 1)
    batch = pair.get("dp", 1) * pair.get("micro_batches", 1)
    interleaved = "interleaved" in pair.get("stages", "")
    return any(
        (
            ranks > 8,
            batch > 8,
            pair.get("ep", 1) * pair.get("etp", 1) * pp > 8,
            # 8 expert ranks are all ranks, and of these tensor and context take 4 at most.
            pair.get("ep") == 8 and pair.get("dp") == 1,
            pair.get("pp") == 1 and pair.get("stages") in divided,
            interleaved and pair.get("micro_batches") == 1,
            # Settings that megatron-core's own layer does not have, or not exactly.
            pair.get("router") == "vanilla"
            and (
                pair.get("gates") == "nonzero"
                or pair.get("scope") == "global"
                or pair.get("capacity") is True
                or pair.get("dispatcher") == "alltoall_dedup"
            ),
        )
    )


def test_every_pair_of_options_is_in_the_matrix():
    missing = [
        (one, value, other, other_value)
        for one, other in combinations(OPTIONS, 2)
        for value, other_value in product(OPTIONS[one], OPTIONS[other])
        if not any(getattr(c, one) == value and getattr(c, other) == other_value for c in PAIRS)
        and not is_impossible(one, value, other, other_value)
    ]
    assert not missing


def test_cells_read_as_they_are_written():
    cells = [*PAIRS, *CORNERS, *DEDUP, *FAST]
    assert parse_cells("\n".join(map(str, cells))) == cells


def test_the_matrix_is_large_and_without_repetition():
    cells = [*PAIRS, *CORNERS, *DEDUP]
    assert len(cells) == len(set(cells)) >= 40


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "dp"])
def test_the_fast_subset_has_every_option(option):
    assert {getattr(cell, option) for cell in FAST} >= set(OPTIONS[option]) - {1}
