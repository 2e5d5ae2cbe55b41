"""`moepp bench collectives` on gloo ranks: the data that arrives, and that a wrong one is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools

OPERATIONS = (
    "all_to_all",
    "all_to_all_uneven",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "send_receive",
)


def measure(dtype: str, group_sizes: list[int]) -> list[dict[str, Any]]:
    """Sizes among which one divides into nothing: 4 bytes among several ranks."""
    from dataclasses import asdict

    import torch

    from moepp_megatron.workbench.bench.collectives import CollectiveSetting, run_collectives

    setting = CollectiveSetting(OPERATIONS, [4, 1000], group_sizes, dtype, 1, 1, 2)
    return [asdict(result) for result in run_collectives(setting, torch.device("cpu"), 2)]


@pytest.mark.parametrize(("world", "dtype"), [(2, "fp32"), (4, "bf16")])
def test_data_arrives_in_all_operations_and_groups(
    ranks: RankPools, world: int, dtype: str
) -> None:
    group_sizes = [2, 4][: world // 2]
    by_rank = ranks(world).run(measure, dtype, group_sizes)
    assert all(records == by_rank[0] for records in by_rank), "all ranks report the same"
    assert len(by_rank[0]) == len(OPERATIONS) * 2 * len(group_sizes)
    width = {"fp32": 4, "bf16": 2}[dtype]
    for record in by_rank[0]:
        assert record["wrong"] == 0, record
        assert record["nodes"] == -(-record["group_size"] // 2)
        assert record["size_bytes"] == record["count"] * width
        parts = {
            ("all_reduce", True): 1,
            ("send", True): 1,
            ("all_to_all", False): record["group_size"] ** 2,
        }.get((record["operation"], record["even"]), record["group_size"])
        # The next smaller size that divides, or one element for each part.
        assert record["count"] in (1000 // width // parts * parts, max(4 // width, parts))
        assert record["time_min_us"] <= record["time_us"] <= record["time_max_us"]


def sabotaged(kind: str) -> int:
    """Wrong elements on all ranks when one element of rank 0's data is not what it should be."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.workbench.bench.collective_cases import KINDS, Buffers, Case, RankGroup

    device = torch.device("cpu")
    group = RankGroup(dist.group.WORLD, tuple(range(dist.get_world_size())))
    buffers = Buffers(64, torch.float32, device)
    if dist.get_rank() == 0:
        # What rank 0 sends to the last rank too, in every operation: its last element.
        case = Case(KINDS[kind], group, 256, buffers)
        sent = case.sent_elements()
        buffers.moved[sent - 1] += 1
        buffers.summed[sent - 1] += 1
    wrong = torch.tensor(Case(KINDS[kind], group, 256, buffers).wrong())
    dist.all_reduce(wrong)
    return int(wrong)


@pytest.mark.parametrize("kind", OPERATIONS)
def test_one_wrong_element_is_counted(ranks: RankPools, kind: str) -> None:
    # Where everybody receives it, two ranks see it.
    seen_by = 2 if kind in ("all_reduce", "all_gather") else 1
    assert ranks(2).run(sabotaged, kind) == [seen_by] * 2
