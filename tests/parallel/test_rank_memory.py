"""Parameters that `--dry-run` prints are those that ranks hold."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.layouts import Cell, run_settings
from tests.parallel.ranks import RankPools

CELLS = [
    Cell(ranks=1, extras="tied"),
    Cell(ranks=4, tp=2, pp=2, ep=2, extras="shared", layers="mixed"),
    Cell(ranks=4, pp=4, stages="ends apart", extras="tied", router="two layers"),
    Cell(ranks=4, tp=2, pp=2, ep=2, stages="uneven interleaved", extras="gqa"),
    Cell(ranks=4, ep=2, etp=2, optimizer="whole", dtype="bf16"),
    Cell(ranks=2, cp=2, router="vanilla", dtype="bf16"),
]


def held(raw: dict[str, Any]) -> tuple[Any, tuple[int, int], int]:
    """What is said of this rank; parameters outside and in FFN experts, optimizer bytes."""
    import torch
    import torch.distributed as dist

    from moepp_megatron.config import Layout, parse_config
    from moepp_megatron.config.rank_memory import rank_memory
    from moepp_megatron.runtime.distributed import build_groups
    from moepp_megatron.training.setup import build_training_model

    config = parse_config(raw)
    layout = Layout.from_config(config, dist.get_world_size())
    build_groups(config, layout)
    model = build_training_model(config)
    sizes = [0, 0]
    for chunk in model.models:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1.0)
            sizes[not getattr(parameter, "allreduce", True)] += parameter.numel()
    model.optimizer.step()
    state = 0
    for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                moments = optimizer.optimizer.state[parameter]
                state += sum(
                    value.numel() * value.element_size()
                    for value in moments.values()
                    if torch.is_tensor(value) and value.numel() == parameter.numel() > 1
                )
                if config.precision.dtype == "bf16":
                    state += parameter.numel() * parameter.element_size()
    place = layout.coordinates(dist.get_rank())
    return rank_memory(config, layout, place.pp), tuple(sizes), state


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_ranks_hold_what_is_printed(ranks: RankPools, cell: Cell) -> None:
    results = ranks(cell.ranks).run(held, run_settings(cell))
    for said, (dense, experts), _ in results:
        assert (said.dense, said.experts) == (dense, experts)
        assert said.gradients == 4 * (dense + experts)
    # The shards of the distributed optimizer are as even as whole buckets allow.
    optimizer = sum(state for *_, state in results)
    assert optimizer == pytest.approx(sum(said.optimizer for said, *_ in results), rel=0.01)
