"""Does MoE++ pay? A ladder of model sizes that all arms climb with the same care.

    python -m benchmarks.ladder OUT [--stage STAGE ...] [--arms ARM ...] [--sizes SIZE ...]
                                    [--from FILE] [--until HH:MM]
    python -m benchmarks.ladder OUT --collect FILE

tune    On size S, seed 0, each arm finds its learning rate and its initial weights by the same rule
        (`tuned`). Other sizes scale them by 1/width and 1/sqrt(width).
rungs   Sizes XS to L, seeds 1 to 3, mixture A: vanilla's steps, and the steps that come to
        vanilla's FLOP (`config/flops.py`, with the FFN share that the run of equal steps measured).
decide  One setting of the paper's arm at a time: sizes XS and S, seeds 11 to 15, mixture B, whose
        corpora chose nothing.
top     Size XL at vanilla's FLOP. `ladder_table --predict XL` comes first.
equal   Equal FFN work: tokens take as many FFN experts on average as vanilla's, of more picks
        (`EQUAL`), tuned as before but with two seeds each. Size S, seeds 1 to 5, mixture A; the
        control; the arms of `MIDDLE` on size M, those of `FINE` with three seeds.
proof   The arms of `PROVED` on size L, seeds 31 to 33, mixture C, which chose nothing; the best
        and its vanilla with seeds 34 and 35 too.
beyond  The best arm and its vanilla on size XL, seeds 41 to 43, mixture C; predicted first.
power   The same two, as `equal` and `proof` have them, with as many seeds more as these ask for:
        13 in all on M, seeds 6 to 13; 22 in all on L, seeds 36 to 52; predicted first.

A mixture is a third each of source text, English prose and other languages, from the files of the
machine (`fault_corpora`). Within a seed all arms see the same tokens in the same order, as far as
they go, and all validate on the same tenth that is held out. A run is one process on one core and
leaves OUT/NAME.json; what is there is not run again. Several processes may work at once.
`--collect` writes all results into one file, a line a run, and `--from` takes them over.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder_run import (
    ARMS,
    CHANGES,
    DECIDING,
    EQUAL,
    SIZES,
    Run,
    machine,
    measure,
    steps_for_flop,
)
from moepp_megatron.runtime import cpu_support, distributed
from moepp_megatron.runtime.atomic import lock, write_atomic
from moepp_megatron.runtime.optional import quiet
from moepp_megatron.runtime.rank import RankEnvironment

RATES, STDS = (1.5e-3, 3e-3, 6e-3), (0.03, 0.06, 0.12)
TOP = "XL"
# The same of arms of equal FFN work, of which each trial has two seeds.
EQUAL_RATES = (6e-3, 12e-3, 24e-3)
CONTROLLED = ("vanilla selected", "K3 mix nonzero", "K4 zero nonzero", "K3 null nonzero")
MIDDLE = (
    "vanilla",
    "vanilla selected",
    "K3 mix none",
    "K3 mix nonzero",
    "K4 mix nonzero",
    "K3 zero nonzero",
    "K3 copy selected",
)
PROVED = ("vanilla selected", "K3 mix nonzero", "K4 mix nonzero", "K3 zero nonzero")
BEYOND = PROVED[:2]
FINE = ("vanilla fine", "fine K10", "fine K12")


class Missing(Exception):
    """A run, the argument, without a result, which another depends on."""


class Results:
    """Results of finished runs, in a folder."""

    def __init__(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out

    def path(self, run: Run) -> Path:
        """Return the path of a result."""
        return self.out / f"{run.name}.json"

    def of(self, run: Run) -> dict[str, Any]:
        """The result of a run; `Missing` if there is none."""
        if not self.path(run).exists():
            raise Missing(run)
        found: dict[str, Any] = json.loads(self.path(run).read_text())
        return found

    def collect(self, file: Path) -> None:
        """Write all results into one file, with machine and texts, a line a run."""
        # The tokenizer was trained on all texts of the machine.
        texts = sha256((self.out / "corpora" / "tokenizer.json").read_bytes()).hexdigest()[:8]
        found = [json.loads(path.read_text()) for path in sorted(self.out.glob("* *.json"))]
        # What was taken over keeps its own.
        lines = [json.dumps({"machine": machine(), "texts": texts, **result}) for result in found]
        write_atomic(file, "".join(f"{line}\n" for line in lines).encode())

    def take_over(self, file: Path) -> None:
        """Fill in results from a file of `collect` that are not here yet."""
        for line in file.read_text().splitlines():
            path = self.path(Run(**json.loads(line)["run"]))
            if not path.exists():
                write_atomic(path, line.encode())


def valid(result: dict[str, Any]) -> float:
    """Validation loss, the mean of the corpora."""
    return float(np.mean(list(result["valid"].values())))


def tuned(arm: str, results: Results, stage: str = "tune") -> tuple[float, float]:
    """Learning rate and initial weights of an arm, the same rule for each.

    First the rate at the middle of `STDS`, then the standard deviation at the best rate: the best
    of three values a factor of two apart; the range is widened while the best is at its end.
    """
    rates, stds, seeds = {
        "tune": (RATES, STDS, (0,)),
        "tune equal": (EQUAL_RATES, STDS, (0, 6)),
    }[stage]

    def loss(rate: float, std: float) -> float:
        steps = SIZES["S"].steps
        runs = [Run(stage, arm, "S", seed, steps, rate, std) for seed in seeds]
        return float(np.mean([valid(results.of(run)) for run in runs]))

    rate = best(rates, lambda value: loss(value, stds[1]))
    return rate, best(stds, lambda value: loss(rate, value))


def best(values: tuple[float, ...], loss: Callable[[float], float]) -> float:
    """The value of lowest loss, widened by factors of two until it is at neither end."""
    found = {value: loss(value) for value in values}
    while True:
        lowest = min(found, key=found.__getitem__)
        if lowest == min(found):
            found[lowest / 2] = loss(lowest / 2)
        elif lowest == max(found):
            found[lowest * 2] = loss(lowest * 2)
        else:
            return lowest


# Runs, each of which may depend on those before it; `Missing` where it depends on another stage's.
Chain = Callable[[Results], Iterator[Run]]


def chains(stage: str, arms: list[str], sizes: list[str]) -> list[Chain]:
    """The runs of a stage, in the order in which they are run."""
    rungs = product((size for size in sizes if size != TOP), (1, 2, 3), arms)
    decide = product(range(11, 16), (size for size in sizes if size in DECIDING), CHANGES)
    stages: dict[str, list[Chain]] = {
        "tune": [partial(_tuning, arm) for arm in arms],
        "rungs": [partial(_rung, *cell) for cell in rungs],
        "decide": [partial(_decide, *cell) for cell in decide],
        "top": [partial(_top, arm) for arm in arms if TOP in sizes],
        "tune equal": [partial(_equal_tuning, arm) for arm in EQUAL if not EQUAL[arm].tuned_as],
        "equal": [
            *(_equals("equal", "S", range(1, 6), list(EQUAL), "A")),
            *(_equals("control", "S", range(1, 6), CONTROLLED, "control")),
            *(_equals("equal", "M", range(1, 6), MIDDLE, "A")),
            *(_equals("equal", "M", range(1, 4), FINE, "A")),
        ],
        "proof": [
            *(_equals("proof", "L", range(31, 34), PROVED, "C")),
            *(_equals("proof", "L", range(34, 36), BEYOND, "C")),
        ],
        "beyond": [*_equals("beyond", TOP, range(41, 44), BEYOND, "C")],
        "power": [
            *(_equals("power", "M", range(6, 14), BEYOND, "A")),
            *(_equals("power", "L", range(36, 53), BEYOND, "C")),
        ],
    }
    return stages[stage]


def _tuning(arm: str, results: Results) -> Iterator[Run]:
    tuned(arm, results)
    yield from ()


def _equal_steps(arm: str, size: str, seed: int, results: Results) -> Run:
    return Run("rungs", arm, size, seed, SIZES[size].steps, *tuned(arm, results))


def _rung(size: str, seed: int, arm: str, results: Results) -> Iterator[Run]:
    first = _equal_steps(arm, size, seed, results)
    yield first
    steps = steps_for_flop(arm, size, results.of(first)["share"])
    if steps != first.steps:
        yield Run("rungs", arm, size, seed, steps, first.rate, first.std, what="flop")


def _decide(seed: int, size: str, what: str, results: Results) -> Iterator[Run]:
    tuning = tuned("paper", results)
    yield Run("decide", "paper", size, seed, SIZES[size].steps, *tuning, "B", what)


def _top(arm: str, results: Results) -> Iterator[Run]:
    shares = [results.of(_equal_steps(arm, "L", seed, results))["share"] for seed in (1, 2, 3)]
    steps = steps_for_flop(arm, TOP, float(np.mean(shares)))
    yield Run("top", arm, TOP, 1, steps, *tuned(arm, results), what="flop")


def _equal_tuning(arm: str, results: Results) -> Iterator[Run]:
    tuned(arm, results, "tune equal")
    yield from ()


def _equals(
    stage: str, size: str, seeds: range, arms: Sequence[str], mixture: str
) -> Iterator[Chain]:
    for seed, arm in product(seeds, arms):
        yield partial(_equal, stage, size, seed, arm, mixture)


def _equal(
    stage: str, size: str, seed: int, arm: str, mixture: str, results: Results
) -> Iterator[Run]:
    tuning = tuned(EQUAL[arm].tuned_as or arm, results, "tune equal")
    yield Run(stage, arm, size, seed, SIZES[size].steps, *tuning, mixture)


def missing(chosen: list[Chain], results: Results) -> list[Run]:
    """Runs without a result, all of whose dependencies have one, each once."""
    found: dict[Run, None] = {}
    for chain in chosen:
        try:
            for run in chain(results):
                results.of(run)
        except Missing as error:
            found[error.args[0]] = None
    return list(found)


def one_run(chosen: list[Chain], results: Results) -> bool:
    """Run the first run that is missing and that no other process has; False if there is none."""
    for run in missing(chosen, results):
        with results.path(run).with_suffix(".lock").open("w") as file:
            # Another process may have it, or have finished it since.
            if lock(file.fileno()) and not results.path(run).exists():
                result = measure(run, results.out)
                write_atomic(results.path(run), json.dumps(result).encode())
                numbers = f"{valid(result):.4f}, share {result['share']:.3f}"
                print(f"{run.name}: {numbers}, {result['cpu_s']:.0f} s", flush=True)
                return True
    return False


def deadline(clock: str, now: datetime) -> datetime:
    """The next time that a clock shows HH:MM."""
    time_of_day = datetime.strptime(clock, "%H:%M").time()
    then = datetime.combine(now.date(), time_of_day)
    return then if then > now else then + timedelta(days=1)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("out", type=Path, help="folder of the results")
    stages = ["tune", "rungs", "decide"]
    add(
        "--stage",
        nargs="*",
        default=stages,
        choices=[*stages, "top", "tune equal", "equal", "proof", "beyond", "power"],
    )
    add("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    add("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    add("--from", dest="taken", type=Path, metavar="FILE", help="results of another machine")
    add("--until", metavar="HH:MM", help="start no run after the next HH:MM")
    add("--collect", type=Path, metavar="FILE", help="write all results, a line a run")
    arguments = parser.parse_args()
    results = Results(arguments.out)
    if arguments.taken:
        results.take_over(arguments.taken)
    if arguments.collect:
        results.collect(arguments.collect)
        return
    chosen = [
        chain
        for stage in arguments.stage
        for chain in chains(stage, arguments.arms, arguments.sizes)
    ]
    end = deadline(arguments.until, datetime.now()) if arguments.until else datetime.max
    quiet()
    cpu_support.install()
    distributed.start(RankEnvironment())
    while datetime.now() < end:
        if not one_run(chosen, results):
            if not missing(chosen, results):
                break
            # What is left depends on runs that other processes have.
            time.sleep(5)
    distributed.stop()


if __name__ == "__main__":
    main()
