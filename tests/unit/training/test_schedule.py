"""The learning rate and the batch size of every step."""

import math
from types import SimpleNamespace

import pytest

from moepp_megatron.config import Layout, check_config
from moepp_megatron.training.schedule import (
    BatchSizes,
    _BatchStage,
    build_schedule,
    learning_rate,
)
from tests.unit.training.conftest import config_of

TRAINING = {"train_iters": 20, "global_batch_size": 8, "micro_batch_size": 2}
PEAK, LEAST, WARMUP, DECAY = 1.0e-3, 1.0e-4, 4, 8


def schedule_of(style, **changes):
    """A run of 20 steps with 4 of warmup."""
    optimizer = {"lr": PEAK, "min_lr": LEAST, "decay_style": style, "warmup_iters": WARMUP}
    return config_of(training=TRAINING, optimizer=optimizer | changes)


def wsd(fall):
    return LEAST + (PEAK - LEAST) * fall


# Step 16 is half way through the 8 steps of decay.
WSD_STYLES = {
    "linear": 0.5,
    "cosine": 0.5,
    "exponential": 2 * 0.5**0.5 - 1,
    "minus_sqrt": 1 - math.sqrt(0.5),
}


@pytest.mark.parametrize("style", WSD_STYLES)
def test_wsd_keeps_its_rate_until_its_last_steps(style):
    config = schedule_of("WSD", wsd_decay_iters=DECAY, wsd_decay_style=style)
    assert learning_rate(config, 2) == pytest.approx(PEAK / 2)
    assert [learning_rate(config, step) for step in range(4, 13)] == [PEAK] * 9
    assert learning_rate(config, 16) == pytest.approx(wsd(WSD_STYLES[style]), rel=1e-12)
    assert learning_rate(config, 20) == pytest.approx(LEAST, rel=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-square-root", "WSD"])
def test_an_optimizer_trains_with_the_rate_that_is_shown(style):
    changes = {"wsd_decay_iters": DECAY} if style == "WSD" else {}
    config = schedule_of(style, **changes)
    optimizer = SimpleNamespace(param_groups=[{}])
    scheduler = build_schedule(config, optimizer)
    for step in range(1, 21):
        scheduler.step(increment=1)
        assert optimizer.param_groups[0]["lr"] == learning_rate(config, step)


def ramped(**changes):
    """2 sequences a step, from 96 tokens (6 sequences) on 4, from 288 tokens (18) on 8."""
    ramp = [[0, 2], [96, 4], [288, 8]]
    return config_of(training=TRAINING | {"batch_ramp": ramp} | changes)


def test_a_ramp_counts_tokens():
    stages = [_BatchStage(1, 2, 0), _BatchStage(4, 4, 6), _BatchStage(7, 8, 18)]
    assert BatchSizes(ramped()).stages() == stages
    assert BatchSizes(ramped()).planned_samples() == 3 * 2 + 3 * 4 + 14 * 8
    assert BatchSizes(ramped(train_iters=5)).planned_samples() == 3 * 2 + 2 * 4
    assert BatchSizes(config_of(training=TRAINING)).planned_samples() == 20 * 8


def test_a_ramp_gives_each_rank_its_micro_batches():
    config = ramped(micro_batch_size=1)
    layout = Layout.from_config(config, 2)
    sizes = BatchSizes(config)
    assert layout.num_microbatches == 4
    assert [sizes.layout(layout, read).num_microbatches for read in (0, 5, 6, 17, 18)] == [
        1,
        1,
        2,
        2,
        4,
    ]


@pytest.mark.parametrize(
    ("steps", "warmup"), [(200, 100), (101, 100), (100, 10), (40, 4), (8, 1), (2, 1), (1, 0)]
)
@pytest.mark.parametrize("style", ["cosine", "inverse-square-root"])
def test_a_short_try_warms_up_for_a_tenth_of_its_steps(style, steps, warmup):
    optimizer = {"lr": PEAK, "decay_style": style, "warmup_iters": 100}
    config = config_of(training=TRAINING | {"train_iters": steps}, optimizer=optimizer)
    assert config.warmup_iters == warmup
    if warmup:
        assert learning_rate(config, warmup) == pytest.approx(PEAK)
    told = [line for line in check_config(config) if "warmup" in line]
    assert len(told) == (warmup != 100)
    assert all(f"is taken for {warmup}, a tenth of the run" in line for line in told)


def test_a_part_of_a_schedule_of_given_length_warms_up_as_the_whole():
    optimizer = {"lr": PEAK, "warmup_iters": 3, "decay_iters": 40}
    whole, *parts = (
        config_of(training=TRAINING | {"train_iters": steps}, optimizer=optimizer)
        for steps in (40, 3, 2, 1)
    )
    for part in parts:
        for step in range(1, part.training.train_iters + 1):
            assert learning_rate(part, step) == learning_rate(whole, step)
        assert not [line for line in check_config(part) if "warmup" in line]
