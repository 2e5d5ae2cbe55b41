"""Schedules of learning rate and batch size in whole runs: resumed, branched, on more ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.schedule import learning_rate
from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings
from tests.parallel.ranks import RankPools

WSD = {"decay_style": "WSD", "wsd_decay_iters": 4, "decay_iters": None, "min_lr": 1.0e-5}
# 2 sequences of 16 tokens for 2 steps, 4 for 2, then 8.
RAMP = [[0, 2], [64, 4], [192, 8]]
SIZES = [2, 2, 4, 4, 8, 8, 8, 8]
# Sums over another number of ranks round otherwise: fp32, a few steps.
SAME = 1e-5


def test_a_branch_decays_as_a_run_that_was_to_end_there(
    ranks: RankPools, corpus: Path, tmp_path: Path
) -> None:
    def run(name: str, steps: int, **checkpoint: Any) -> dict[str, Any]:
        training = {"train_iters": steps}
        sections = {"training": training, "optimizer": WSD, "checkpoint": checkpoint}
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        ranks(1).run(run_trainer, raw)
        return raw

    run("long", 16, save_interval=6)
    straight = run("straight", 10)
    start = tmp_path / "long" / "checkpoints" / "step_00000006"
    run("branch", 10, load=str(start))

    for key in ("loss", "grad_norm", "lr"):
        whole = logged(tmp_path / "straight", key)
        assert logged(tmp_path / "branch", key) == whole[6:]
        assert logged(tmp_path / "long", key)[:6] == whole[:6]
    assert logged(tmp_path / "branch") != logged(tmp_path / "long")[6:10]
    config = parse_config(straight)
    rates = [learning_rate(config, step) for step in range(1, 11)]
    assert logged(tmp_path / "straight", "lr") == rates
    assert rates[5] > rates[6] > rates[9]


@pytest.mark.parametrize("parallel", [{}, {"overlap_grad_reduce": True}], ids=["one", "dp2"])
def test_a_ramp_goes_on_where_it_was(
    ranks: RankPools, corpus: Path, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    world_size = 2 if parallel else 1

    def run(name: str, steps: int, ranks_of_it: int = world_size, **sections: Any) -> None:
        training = {"train_iters": steps, "micro_batch_size": 1, "batch_ramp": RAMP}
        sections |= {"training": training, "parallel": parallel if ranks_of_it > 1 else {}}
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        ranks(ranks_of_it).run(run_trainer, raw)

    checkpoint = {"save_interval": 3, "load": "auto"}
    run("whole", 8)
    # Within a stage, one step before the next.
    run("run", 3, checkpoint=checkpoint)
    run("run", 8, checkpoint=checkpoint)

    assert logged(tmp_path / "whole", "batch_size") == SIZES
    tokens = [16 * sum(SIZES[:step]) for step in range(1, 9)]
    assert logged(tmp_path / "run", "tokens") == tokens
    for key in ("loss", "grad_norm", "balance_loss"):
        assert logged(tmp_path / "run", key) == logged(tmp_path / "whole", key)
    if world_size > 1:
        run("alone", 8, ranks_of_it=1)
        for key in ("loss", "grad_norm", "balance_loss"):
            alone = logged(tmp_path / "alone", key)
            assert logged(tmp_path / "whole", key) == pytest.approx(alone, rel=SAME)
