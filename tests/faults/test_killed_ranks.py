"""Ranks killed at random moments: the run ends with the losses of a run that nobody disturbed."""

import random
import signal
import statistics

import pytest

from tests.faults.harness import (
    going_on,
    kill_some,
    losses,
    ranks_of,
    short_steps,
    training,
    wait_for_step,
    write_config,
)

STEPS = 40


def undisturbed(folder, data, num_ranks, steps):
    run = folder / "undisturbed"
    config = folder / "undisturbed.yaml"
    # Nothing continues from it, so it saves nothing.
    sizes = short_steps(num_ranks)
    write_config(config, data, run, num_ranks, save_interval=0, train_iters=steps, **sizes)
    with training(config, num_ranks) as process:
        assert process.wait() == 0, config.with_suffix(".log").read_text()[-3000:]
    return losses(run)


def survive(folder, data, num_ranks, steps, kills, is_cold=False):
    run = folder / "disturbed"
    sizes = short_steps(num_ranks)
    config = write_config(
        folder / "disturbed.yaml", data, run, num_ranks, train_iters=steps, **sizes
    )
    with training(config, num_ranks, 2 * kills, is_cold) as process:
        done = kill_some(process, run, kills, steps, random.Random(num_ranks))
        assert process.wait() == 0, config.with_suffix(".log").read_text()[-3000:]
    return losses(run), done


def summed_up(done):
    """For the table of long tests."""
    waits = sorted(done.recovery_s)
    return (
        f"{done.hit} kills, {done.during_save} during a save; from kill to next step "
        f"{statistics.median(waits):.1f} s, {waits[0]:.1f} to {waits[-1]:.1f}"
    )


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_two_kills(tmp_path, data):
    expected = undisturbed(tmp_path, data, 2, STEPS)
    actual, done = survive(tmp_path, data, 2, STEPS, kills=2)
    assert done.hit == 2
    # The same layout continues to the bit.
    assert actual == expected
    assert sorted(actual) == list(range(1, STEPS + 1))


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_twenty_kills(tmp_path, data, num_ranks, record_property):
    steps = 600
    expected = undisturbed(tmp_path, data, num_ranks, steps)
    actual, done = survive(tmp_path, data, num_ranks, steps, kills=20, is_cold=True)
    record_property("measured", summed_up(done))
    assert done.hit == 20
    assert done.during_save > 0, "no kill fell into a save"
    assert done.during_save < 20, "no kill fell between saves"
    assert actual == expected


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_stop_on_request_and_go_on_as_printed(tmp_path, data):
    """Each request saves, loses nothing and prints the command that resumes the one run."""
    run = tmp_path / "run of mine"
    config = write_config(tmp_path / "run.yaml", data, run, 2, train_iters=20000, **short_steps(2))
    with training(config, 2) as process:
        stopped_at, lines = _stopped(process, config, run, signal.SIGINT)
    assert "Traceback" not in "".join(lines)
    assert lines[-3:-1] == [f"stopped on request at step {stopped_at}, saved", "to resume:"]
    records = (run / "metrics.jsonl").read_bytes()
    with training(config, 2) as process:
        assert process.wait(timeout=120) == 2
    assert (run / "metrics.jsonl").read_bytes() == records
    checkpoint = run / "checkpoints" / f"step_{stopped_at:08d}"
    with going_on(lines[-1], config) as process:
        ended_at, more = _stopped(process, config, run, signal.SIGTERM)
    assert f"resumed from step {stopped_at} of {checkpoint}" in more
    assert more[-1] == lines[-1]
    assert sorted(losses(run)) == list(range(1, ended_at + 1))
    assert (run / "metrics.jsonl").read_bytes().startswith(records)


def _stopped(process, config, run, number):
    """Asks a run to stop after three more steps: its last step, and what it has printed."""
    log = config.with_suffix(".log")
    before = max(losses(run), default=0)
    wait_for_step(process, run, before + 3, log)
    process.send_signal(number)
    assert process.wait(timeout=120) == 75, log.read_text()[-3000:]
    assert not ranks_of(process)
    stopped_at = max(losses(run))
    latest = (run / "checkpoints/latest").read_text().strip()
    assert latest == f"step_{stopped_at:08d}", "nothing is lost but what came after the request"
    return stopped_at, log.read_text().splitlines()
