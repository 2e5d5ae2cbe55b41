"""Schedules of learning rate and batch size in whole runs: resumed, branched, on more ranks."""

import pytest

from moepp_megatron.config import parse_config
from moepp_megatron.training.schedule import learning_rate
from tests.parallel.checkpoint_runs import logged, run_trainer, trainer_settings

WSD = {"decay_style": "WSD", "wsd_decay_iters": 2, "decay_iters": None, "min_lr": 1.0e-5}
# 2 sequences of 16 tokens for a step, 4 for two, then 6.
RAMP = [[0, 2], [32, 4], [160, 6]]
SIZES = [2, 4, 4, 6, 6]
# Sums over another number of ranks round otherwise: fp32, a few steps.
SAME = 1e-5


def test_a_branch_decays_as_a_run_that_was_to_end_there(ranks, corpus, tmp_path):
    def run(name, steps, **checkpoint):
        training = {"train_iters": steps, "global_batch_size": 4}
        sections = {"training": training, "optimizer": WSD, "checkpoint": checkpoint}
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        ranks(1).run(run_trainer, raw)
        return raw

    run("long", 8, save_interval=3)
    straight = run("straight", 5)
    start = tmp_path / "long/checkpoints/step_00000003"
    run("branch", 5, load=str(start))

    for key in ("loss", "grad_norm", "lr"):
        whole = logged(tmp_path / "straight", key)
        assert logged(tmp_path / "branch", key) == whole[3:]
        assert logged(tmp_path / "long", key)[:3] == whole[:3]
    # The rate of the first step of the decay shows in the loss of the second.
    assert logged(tmp_path / "branch") != logged(tmp_path / "long")[3:5]
    config = parse_config(straight)
    rates = [learning_rate(config, step) for step in range(1, 6)]
    assert logged(tmp_path / "straight", "lr") == rates
    assert rates[2] > rates[3] > rates[4]


@pytest.mark.parametrize("parallel", [{}, {"overlap_grad_reduce": True}], ids=["one", "dp2"])
def test_a_ramp_continues_where_it_was(ranks, corpus, tmp_path, parallel):
    world_size = 2 if parallel else 1

    def run(name, steps, ranks_of_it=world_size, **sections):
        training = {
            "train_iters": steps,
            "micro_batch_size": 1,
            "global_batch_size": SIZES[-1],
            "batch_ramp": RAMP,
        }
        sections |= {
            "training": training,
            "optimizer": {"warmup_iters": 0},
            "parallel": parallel if ranks_of_it > 1 else {},
        }
        raw = trainer_settings(corpus, tmp_path / name, **sections)
        ranks(ranks_of_it).run(run_trainer, raw)

    checkpoint = {"save_interval": 2, "load": "auto"}
    run("whole", 5)
    # Within a stage, one step before the next.
    run("run", 2, checkpoint=checkpoint)
    run("run", 5, checkpoint=checkpoint)

    assert logged(tmp_path / "whole", "batch_size") == SIZES
    tokens = [16 * sum(SIZES[:step]) for step in range(1, 6)]
    assert logged(tmp_path / "run", "tokens") == tokens
    for key in ("loss", "grad_norm", "balance_loss"):
        assert logged(tmp_path / "run", key) == logged(tmp_path / "whole", key)
    if world_size > 1:
        run("alone", 5, ranks_of_it=1)
        for key in ("loss", "grad_norm", "balance_loss"):
            alone = logged(tmp_path / "alone", key)
            assert logged(tmp_path / "whole", key) == pytest.approx(alone, rel=SAME)
