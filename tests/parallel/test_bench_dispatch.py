"""`moepp bench dispatch` on gloo ranks: the bytes of the dispatchers; wrong ones are seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.ranks import RankPools

TOKENS, HIDDEN, EXPERTS, TOPK, PHI = 96, 32, 4, 2, 0.5


def measure(dtype: str) -> list[dict[str, Any]]:
    """This rank's results, and what its own selections ask for."""
    from dataclasses import asdict

    from moepp_megatron.workbench.bench.dispatch import DispatchSetting, run_dispatch_benchmark

    setting = DispatchSetting(TOKENS, HIDDEN, EXPERTS, TOPK, PHI, dtype)
    return [asdict(result) for result in run_dispatch_benchmark(setting, rounds=2, warmup=1)]


def remote_vectors() -> list[tuple[int, int]]:
    """(rows, distinct tokens) that the selections of phi send to the other one of two ranks."""
    import torch.distributed as dist

    from moepp_megatron.workbench.bench.dispatch import DispatchSetting, draw_selections

    setting = DispatchSetting(TOKENS, HIDDEN, EXPERTS, TOPK, PHI)
    counts = []
    for phi in (1.0, PHI):
        other = draw_selections(setting, phi).view(TOKENS, 2, -1)[:, 1 - dist.get_rank()]
        counts.append((int(other.sum()), int(other.any(dim=1).sum())))
    return counts


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_bytes_are_those_of_the_selections(ranks: RankPools, dtype: str, width: int) -> None:
    pool = ranks(2)
    wanted = pool.run(remote_vectors)
    # Rank 0 sends its own rows out, and in the combine those of the other one back.
    every, some = (
        tuple(map(sum, zip(*counts, strict=True))) for counts in zip(*wanted, strict=True)
    )
    by_rank = pool.run(measure, dtype)
    for records in by_rank:
        vanilla, plain, dedup = records
        assert [record["dispatcher"] for record in records] == ["vanilla", "plain", "dedup"]
        row = HIDDEN * width
        assert vanilla["vector_bytes"] == every[0] * row
        assert plain["vector_bytes"] == some[0] * row
        assert dedup["vector_bytes"] == some[1] * row < plain["vector_bytes"]
        assert vanilla["formula_bytes"] == 2 * TOKENS * TOPK * row / 2
        assert plain["formula_bytes"] == PHI * vanilla["formula_bytes"]
        assert vanilla["time_of_vanilla"] == 1.0
        assert all(record["total_ms"] > 0 for record in records)


def mistaken() -> str:
    """What the benchmark says where a dispatcher sends something else than its rule asks for."""
    from moepp_megatron.workbench.bench import dispatch

    variants = dispatch._variants

    def swapped(setting: Any) -> Any:
        made, dtype = variants(setting)
        made[1].dispatcher, made[2].dispatcher = made[2].dispatcher, made[1].dispatcher
        return made, dtype

    dispatch._variants = swapped
    try:
        measure("fp32")
    except AssertionError as error:
        return str(error)
    finally:
        dispatch._variants = variants
    return ""


def test_other_bytes_than_asked_for_are_an_error(ranks: RankPools) -> None:
    for message in ranks(2).run(mistaken):
        assert message.startswith("plain sent")
