"""The warning before the first step: checkpoints to come against what is free."""

import pytest

from moepp_megatron.config import checkpoint_bytes
from moepp_megatron.runtime.disk import show_bytes
from moepp_megatron.training.checkpoint import retention
from tests.unit.training.conftest import config_of

STEPS = {"train_iters": 100}


@pytest.mark.parametrize(
    ("keep", "there", "step", "count"),
    [
        (2, 0, 0, 3),
        # Those that are there have their room.
        (2, 1, 20, 2),
        (2, 5, 60, 1),
        # Fewer are still to come.
        (5, 0, 0, 4),
        (None, 0, 0, 4),
        (None, 2, 60, 2),
    ],
)
def test_as_many_as_will_be_there_at_once(write, tmp_path, monkeypatch, keep, there, step, count):
    # The last save, of step 100, is none of the interval's.
    checkpoint = {"keep": keep, "save_interval": 30}
    config = config_of(training=STEPS, checkpoint=checkpoint)
    for number in range(there):
        write(tmp_path, number)
    needed = count * checkpoint_bytes(config)
    monkeypatch.setattr(retention, "free_bytes", lambda _: needed)
    assert retention.lack_of_space(config, tmp_path, step) is None
    monkeypatch.setattr(retention, "free_bytes", lambda _: needed - 1)
    said = retention.lack_of_space(config, tmp_path, step)
    each = show_bytes(checkpoint_bytes(config))
    assert f"needs room for {count} more checkpoints of {each}" in said
    assert f"{show_bytes(needed)} in all, and {show_bytes(needed - 1)} are free" in said


@pytest.mark.parametrize(("interval", "step"), [(0, 0), (30, 100)])
def test_nothing_to_save_needs_no_room(tmp_path, monkeypatch, interval, step):
    monkeypatch.setattr(retention, "free_bytes", lambda _: 0)
    config = config_of(training=STEPS, checkpoint={"save_interval": interval})
    assert retention.lack_of_space(config, tmp_path, step) is None
