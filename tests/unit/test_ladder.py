"""The ladder's rules, on results that are made up."""

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks.ladder import Results, best, chains, deadline, missing
from benchmarks.ladder_run import SIZES, Run, flop_per_token, steps_for_flop

ARMS = ["vanilla", "paper"]


def put(results: Results, run: Run, loss: float = 4.0, share: float = 0.6) -> None:
    result = {"run": run.__dict__, "valid": {"c": loss}, "share": share}
    results.path(run).write_text(json.dumps(result))


@pytest.mark.parametrize("lowest", [0.1, 1.0, 16.0])
def test_the_search_widens_until_it_has_passed_the_minimum(lowest: float) -> None:
    tried: dict[float, float] = {}

    def loss(value: float) -> float:
        return tried.setdefault(value, abs(value / lowest - 1))

    found = best((1.0, 2.0, 4.0), loss)
    assert tried[found] < min(tried[found / 2], tried[found * 2])


def test_equal_flop_within_half_a_step() -> None:
    for size in SIZES:
        steps, ours = steps_for_flop("paper", size, 0.6), flop_per_token("paper", size, 0.6)
        budget = SIZES[size].steps * flop_per_token("vanilla", size, 1.0)
        assert abs(steps * ours - budget) <= ours / 2
        assert steps > SIZES[size].steps


def test_every_run_comes_after_those_it_depends_on(tmp_path: Path) -> None:
    results, order = Results(tmp_path), []
    chosen = [chain for stage in ("tune", "rungs") for chain in chains(stage, ARMS, ["XS", "S"])]
    while found := missing(chosen, results):
        order.append(run := found[0])
        share = 1.0 if run.arm == "vanilla" else 0.6 + len(order) / 1000
        put(results, run, abs(run.rate - 0.006) + abs(run.std - 0.06), share)
        if run.what == "flop":
            share = results.of(replace(run, what="steps"))["share"]
            assert run.steps == steps_for_flop(run.arm, run.size, share)
    # Four rates and two more standard deviations an arm; vanilla's FLOP are its own.
    assert [run.stage for run in order] == ["tune"] * 2 * 6 + ["rungs"] * 2 * 3 * (1 + 2)
    assert {(run.rate, run.std) for run in order[12:]} == {(0.006, 0.06)}


def test_results_of_another_machine_are_taken_over(tmp_path: Path) -> None:
    here, there = Results(tmp_path / "here"), Results(tmp_path / "there")
    run = Run("tune", "paper", "S", 0, 1, 0.1, 0.1)
    put(there, run)
    (there.out / "corpora").mkdir()
    (there.out / "corpora" / "tokenizer.json").write_text("{}")
    there.collect(tmp_path / "ladder.jsonl")
    (line,) = (tmp_path / "ladder.jsonl").read_text().splitlines()
    here.take_over(tmp_path / "ladder.jsonl")
    assert here.of(run) == json.loads(line)
    assert json.loads(line).keys() > there.of(run).keys()


def test_a_deadline_past_midnight() -> None:
    assert deadline("00:10", datetime(2026, 12, 1, 23, 50)) == datetime(2026, 12, 2, 0, 10)
    assert deadline("23:55", datetime(2026, 12, 1, 23, 50)) == datetime(2026, 12, 1, 23, 55)
