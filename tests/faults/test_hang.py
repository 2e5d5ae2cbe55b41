"""A rank that is stopped, or stuck: named in time, with the collective that the others wait in."""

import json
import time

import psutil
import pytest
import yaml

from tests.faults.harness import losses, training, wait_for_step, write_config

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Far below what the first step takes.
HANG_TIMEOUT_S = 5.0
# Far above what any other step takes, on a machine that has much else to do, too.
SURE_TIMEOUT_S = 20.0
# torchrun waits 30 s before it kills a rank that does not react to SIGTERM, as a stopped one.
END_TIMEOUT_S = SURE_TIMEOUT_S + 30.0 + 120.0


def start(folder, data, **settings):
    resilience = {"hang_timeout_s": HANG_TIMEOUT_S, **settings}
    return write_config(
        folder / "run.yaml",
        data,
        folder / "run",
        2,
        save_interval=0,
        sections={"resilience": resilience},
        train_iters=100000,
    )


def test_stopped_rank_is_named_and_the_run_ends(tmp_path, data):
    config = start(tmp_path, data, hang_timeout_s=SURE_TIMEOUT_S)
    run = tmp_path / "run"
    with training(config, 2, is_cold=True) as process:
        wait_for_step(process, run, 5, config.with_suffix(".log"))
        beats = run / "heartbeats/rank_00001.json"
        while not beats.exists():
            # The first one comes a second after the start, which may be after five steps.
            time.sleep(0.01)
        rank = psutil.Process(json.loads(beats.read_text())["pid"])
        rank.suspend()
        while rank.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        # Its last one: it beats by the clock, so steps may have come after it.
        beat = json.loads(beats.read_text())
        assert process.wait(END_TIMEOUT_S) not in (0, 75)
        assert not psutil.pid_exists(beat["pid"])
    (folder,) = (run / "hangs").iterdir()
    report = (folder / "report.txt").read_text()
    assert report in config.with_suffix(".log").read_text(), "the report is shown too"
    first, second = report.splitlines()[:2]
    assert first.startswith("hang: rank 1 does not answer; last seen in step ")
    assert f"last seen in step {beat['step']} " in first
    assert 1 <= beat["step"] <= max(losses(run)) + 1
    assert f"process {beat['pid']} on " in first
    assert "which is T (stopped)" in first
    assert second.startswith("  1 other rank waits in gloo:"), "the flight recorder names it"
    # The stack of the rank that waits shows the collective too.
    stacks = (folder / "stacks_rank_0.txt").read_text()
    assert "distributed_c10d.py" in stacks or "stragglers.py" in stacks
    assert "in no collective" not in report


def test_slow_phases_are_no_hangs(tmp_path, data):
    """With a timeout far below what the first step takes, a healthy run reaches its end."""
    path = start(tmp_path, data, hang_slow_phase_timeout_s=300.0)
    config = yaml.safe_load(path.read_text())
    config["training"].update(train_iters=30, eval_iters=2, eval_interval=10)
    config["checkpoint"] = {"save_interval": 10}
    path.write_text(yaml.safe_dump(config))
    with training(path, 2, is_cold=True) as process:
        assert process.wait(240) == 0, path.with_suffix(".log").read_text()[-3000:]
    assert len(losses(tmp_path / "run")) == 30
    assert not (tmp_path / "run/hangs").exists()
