"""Ranks that were started with other settings than rank 0 are refused before they have a group."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from moepp_megatron.training.checkpoint.find import NoStartError
from moepp_megatron.training.run import _must_be_alike, _refuse_unlike
from tests.unit.training.conftest import config_of


def said(*ranks):
    """Return the messages of the ranks; each is given by its sections."""
    store = dist.HashStore()

    def meet(rank):
        alike = _must_be_alike(config_of(**ranks[rank]))
        try:
            _refuse_unlike(store, rank, len(ranks), alike)
        except NoStartError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return set(pool.map(meet, range(len(ranks))))


OTHER = {"optimizer": {"lr": 5e-4}}


@pytest.mark.parametrize(
    ("ranks", "first", "other"),
    [
        ([{}, {}, OTHER], "optimizer.lr (0.001", "0.0005 on rank 2"),
        ([{}, OTHER, OTHER], "optimizer.lr (0.001", "0.0005 on rank 1"),
        ([{}, {"model": {"num_layers": 3}}], "model.num_layers (2", "3 on rank 1"),
    ],
)
def test_each_rank_is_told_the_same(ranks, first, other):
    (line,) = said(*ranks)
    told = f"{first} on rank 0) must be the same on all ranks, and is {other}"
    assert line.startswith(told)
    assert "\n" not in line


@pytest.mark.parametrize("other", [{}, {"checkpoint": {"staging": "/local"}}], ids=str)
def test_ranks_that_are_alike_are_told_nothing(other):
    assert said({}, other) == {""}
