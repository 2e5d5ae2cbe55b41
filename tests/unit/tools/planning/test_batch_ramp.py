"""A run that begins with smaller steps takes their time."""

from dataclasses import replace
from itertools import pairwise

import pytest

from moepp_megatron.config import Config, with_overrides
from moepp_megatron.tools.planning.grid import Grid
from moepp_megatron.tools.planning.imbalance import LEARNED
from moepp_megatron.tools.planning.plan import planned_of, ramp_stages
from moepp_megatron.tools.planning.step import step_time
from moepp_megatron.tools.planning.workload import Workload
from moepp_megatron.training.schedule import batch_stages
from tests.unit.tools.planning.test_costs import configured

# 128 and 256 sequences of 4,096 tokens; neither number of tokens is one of whole steps.
RAMP = "training.batch_ramp=[[0, 128], [5000000, 256], [20000000, 512]]"
GRID = Grid(64, ep=8)


def ramped() -> Config:
    return with_overrides(configured(), [RAMP, "training.train_iters=1000"])


def planned(config, machine):
    return planned_of(config, GRID, 0.0, True, machine, LEARNED)


def test_stages_are_those_of_training(h100):
    config = ramped()
    load = Workload.from_config(config)
    found = list(ramp_stages(config, load, GRID, h100, LEARNED))
    ends = [stage.consumed_samples * load.seq for stage in batch_stages(config)]
    assert [stage.tokens for stage in found] == [end - begin for begin, end in pairwise(ends)]
    for stage, size in zip(found, (128, 256), strict=True):
        step = step_time(replace(load, batch=size), GRID, h100, LEARNED)
        assert stage.tokens_per_s == pytest.approx(size * load.seq / step.total)


def test_a_run_is_the_sum_of_its_steps(h100):
    found, alike = planned(ramped(), h100), planned(configured(), h100)
    load = Workload.from_config(configured())
    first, second = found.ramp
    # 100 whole steps after the ramp.
    tokens = first.tokens + second.tokens + 100 * 512 * load.seq
    steps = {128: first.tokens, 256: second.tokens, 512: 100 * 512 * load.seq}
    seconds = sum(
        read / (size * load.seq) * step_time(replace(load, batch=size), GRID, h100, LEARNED).total
        for size, read in steps.items()
    )
    assert found.run_seconds(tokens) == pytest.approx(seconds)
    # Small steps are slower for each token; a step of the plan is a whole one.
    assert found.run_seconds(tokens) > alike.run_seconds(tokens)
    assert found.step.total == alike.step.total
    # A run that ends within the ramp.
    half = first.tokens / 2
    assert found.run_seconds(half) == pytest.approx(half / first.tokens_per_s)
    assert alike.run_seconds(half) == pytest.approx(half / alike.tokens_per_s_per_gpu / 64)
