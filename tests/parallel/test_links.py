"""The links of a cluster, measured on gloo ranks."""

from typing import Any

import pytest

from tests.parallel.ranks import RankPools

pytestmark = pytest.mark.parallel


def measured() -> list[dict[str, Any]]:
    import torch

    from moepp_megatron.workbench.bench.links import measure

    return measure(4096, torch.device("cpu"), per_node=2)


def test_every_operation_in_groups_of_neighbours_and_of_all(ranks: RankPools) -> None:
    by_rank = ranks(4).run(measured)
    assert all(records == by_rank[0] for records in by_rank), "all ranks report the same"
    found = {(r["operation"], r["group_size"], r["nodes"], r["size_bytes"]) for r in by_rank[0]}
    operations = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "send")
    groups = ((2, 1), (4, 2))
    assert found == {
        (name, *group, size) for name in operations for group in groups for size in (1024, 4096)
    }
    for r in by_rank[0]:
        # nccl-tests: (n - 1) / n, twice that of an all-reduce, 1 between two ranks.
        factor = (r["group_size"] - 1) / r["group_size"]
        factor = {"all_reduce": 2 * factor, "send": 1.0}.get(r["operation"], factor)
        assert r["bus_gb_s"] == pytest.approx(factor * r["size_bytes"] / r["time_us"] / 1e3)
