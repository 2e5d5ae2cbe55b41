"""What the ladder's results say, in Markdown; a prediction of a larger size, and what came of it.

    python -m benchmarks.ladder_table [FILE] [--predict SIZE PREDICTION | --compare PREDICTION]

Losses are nats, the mean of the held-out corpora. Differences are paired by seed, so that initial
weights and the order of the data cancel. Intervals are 95% t-intervals unless they say otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder import valid
from benchmarks.ladder_run import ARMS, BATCH, CHANGES, KINDS, LENGTH, SIZES, Run, flop_per_token
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate, t_below, t_quantile

FILE = Path(__file__).parent / "results" / "ladder.jsonl"
VANILLA = "vanilla"
PAIRS = [*((arm, VANILLA) for arm in ARMS if arm != VANILLA),
         ("selected", "vanilla selected"), ("no residual", "paper")]  # fmt: skip
EQUAL = {"steps": "equal steps", "flop": "equal FLOP"}
Cell = dict[str, dict[str, Any]]


class Ladder:
    """Results by seed, for each stage, arm, size and what was run."""

    def __init__(self, file: Path) -> None:
        self._cells: dict[tuple[str, str, str, str], Cell] = {}
        for line in file.read_text().splitlines():
            result = json.loads(line)
            run = Run(**result["run"])
            # Only runs on the same texts are paired.
            seed = f"{run.seed} {result['corpora']}"
            self._cells.setdefault((run.stage, run.arm, run.size, run.what), {})[seed] = result

    def rung(self, arm: str, size: str, what: str) -> Cell:
        """A cell of the ladder; equal steps are equal FLOP for vanilla."""
        what = "steps" if arm.startswith(VANILLA) else what
        found = self._cells.get(("rungs", arm, size, what), {})
        return found or self._cells.get(("top", arm, size, "flop"), {})

    def decide(self, change: str, size: str) -> Cell:
        """A cell of stage `decide`."""
        return self._cells.get(("decide", "paper", size, change), {})


def losses(cell: Cell, kind: str = "") -> dict[str, float]:
    """Validation loss by seed, of one kind of text or the mean."""
    if not kind:
        return {seed: valid(result) for seed, result in cell.items()}
    return {
        seed: float(np.mean([result["valid"][c] for c in KINDS[result["run"]["mixture"]][kind]]))
        for seed, result in cell.items()
    }


def paired(cell: Cell, other: Cell, kind: str = "") -> list[float]:
    """Loss minus that of the other, of every seed that both have."""
    mine, theirs = losses(cell, kind), losses(other, kind)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


@dataclass(frozen=True)
class Line:
    """A straight line through points, to predict from.

    Attributes:
        middle: Means of x and y.
        slope: The slope, with its error.
        spread: Standard deviation of a point from the line.
        points: How many.
        width: Root of the sum of squares of x.
    """

    middle: tuple[float, float]
    slope: Estimate
    spread: float
    points: int
    width: float

    @staticmethod
    def through(x: Sequence[float], y: Sequence[float]) -> Line:
        """Least squares; three points at least."""
        X, Y = np.array(x), np.array(y)
        middle = float(X.mean()), float(Y.mean())
        width = float(np.sqrt(((X - middle[0]) ** 2).sum()))
        slope = float(((X - middle[0]) * Y).sum() / width**2)
        rest = Y - middle[1] - slope * (X - middle[0])
        spread = float(np.sqrt((rest**2).sum() / (len(x) - 2)))
        return Line(middle, Estimate(slope, spread / width, len(x) - 2), spread, len(x), width)

    def at(self, x: float, runs: int) -> Estimate:
        """The mean of so many new points at x, with the error of its prediction."""
        far = x - self.middle[0]
        error = math.sqrt(1 / runs + 1 / self.points + (far / self.width) ** 2)
        mean = self.middle[1] + self.slope.mean * far
        return Estimate(mean, self.spread * error, self.points - 2)


def log_flop(size: str) -> float:
    """Decimal logarithm of the FLOP of vanilla's run: those of every arm at equal FLOP."""
    return math.log10(flop_per_token(VANILLA, size, 1.0) * SIZES[size].steps * BATCH * LENGTH)


def line_of(ladder: Ladder, arm: str, other: str, sizes: list[str], what: str) -> Line:
    """Log loss of an arm, or its loss less another arm's, over log FLOP; a point for each seed."""
    x, y = [], []
    for size in sizes:
        cell = ladder.rung(arm, size, what)
        logs = [math.log10(loss) for loss in losses(cell).values()]
        found = paired(cell, ladder.rung(other, size, what)) if other else logs
        x += [log_flop(size)] * len(found)
        y += found
    return Line.through(x, y)


def predictions(ladder: Ladder, size: str) -> Iterator[dict[str, Any]]:
    """Of every loss and difference at a size from the smaller ones, for so many new seeds."""
    sizes = list(SIZES)[: list(SIZES).index(size)]
    for what, (arm, other) in product(EQUAL, [*((arm, "") for arm in ARMS), *PAIRS]):
        line = line_of(ladder, arm, other, sizes, what)
        found: dict[str, Any] = {"arm": arm, "less": other, "at": what, "size": size, "from": sizes}
        for seeds in (1, 2, 3):
            guess = line.at(log_flop(size), seeds)
            ends = {"mean": [0.0], "80%": [-guess.reach(0.1), guess.reach(0.1)],
                    "95%": [-guess.reach(0.025), guess.reach(0.025)]}  # fmt: skip
            values = {name: [guess.mean + end for end in each] for name, each in ends.items()}
            found[f"{seeds}"] = {
                name: [round(value if other else 10**value, 4) for value in each]
                for name, each in values.items()
            }
            if other:
                chance = t_below(-guess.mean / (guess.error or math.inf), guess.degrees)
                found[f"{seeds}"]["chance below 0"] = round(chance, 3)
        yield found


def came(ladder: Ladder, prediction: dict[str, Any]) -> list[str]:
    """A row that compares a prediction with what came; empty where nothing has."""
    arm, other, size, what = (prediction[key] for key in ("arm", "less", "size", "at"))
    cell = ladder.rung(arm, size, what)
    found = paired(cell, ladder.rung(other, size, what)) if other else [*losses(cell).values()]
    if not found:
        return []
    guess, mean = prediction[f"{len(found)}"], float(np.mean(found))
    inside = [level for level in ("80%", "95%") if guess[level][0] <= mean <= guess[level][1]]
    (low, high), sign = guess["95%"], "+" if other else ""
    expected = f"{guess['mean'][0]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
    name = f"{arm} less {other}" if other else arm
    return [f"{name}, {EQUAL[what]}", expected, f"{mean:{sign}.3f}", f"{len(found)}",
            f"inside {inside[0]}" if inside else "outside"]  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(estimate: Estimate, level: float = 0.025) -> str:
    """A number with its interval, which is wrong on either side with this probability."""
    reach = estimate.reach(level)
    ends = f" ({estimate.mean - reach:+.3f} to {estimate.mean + reach:+.3f})"
    return f"{estimate.mean:+.3f}" + (ends if math.isfinite(reach) else "")


def difference(cell: Cell, other: Cell, kind: str = "") -> str:
    """The mean of paired differences; nothing where there are none."""
    values = paired(cell, other, kind)
    return shown(Estimate.of(values)) if values else ""


def rungs(ladder: Ladder, sizes: list[str]) -> Iterator[str]:
    """Losses of every arm, differences, differences by kind of text at the largest size, lines."""
    pairs = {f"{arm} less {other}": (arm, other) for arm, other in PAIRS}
    for what, name in EQUAL.items():
        cells = {(arm, size): ladder.rung(arm, size, what) for arm in ARMS for size in sizes}
        rows = [[arm, *(_cell(cells[arm, size]) for size in sizes)] for arm in ARMS]
        yield table([f"{name}: loss (FFN share, steps)", *sizes], rows)
        rows = [[pair, *(difference(cells[arm, size], cells[other, size]) for size in sizes)]
                for pair, (arm, other) in pairs.items()]  # fmt: skip
        yield table([f"{name}: difference", *sizes], rows)
        size, kinds = sizes[-1], list(KINDS["A"])
        rows = [[pair, *(difference(cells[arm, size], cells[other, size], kind) for kind in kinds)]
                for pair, (arm, other) in pairs.items()]  # fmt: skip
        yield table([f"{name}: difference at size {size}", *kinds], rows)
        if len(sizes) > 2:
            drawn = {arm: line_of(ladder, arm, "", sizes, what) for arm in ARMS}
            drawn |= {pair: line_of(ladder, *pairs[pair], sizes, what) for pair in pairs}
            rows = [[each, shown(line.slope), f"{line.spread:.4f}"] for each, line in drawn.items()]
            yield table([f"{name}: line over log FLOP", "slope for a factor of 10", "spread"], rows)


def _cell(cell: Cell) -> str:
    if not cell:
        return ""
    share = np.mean([result["share"] for result in cell.values()])
    steps = np.mean([result["run"]["steps"] for result in cell.values()])
    return f"{np.mean(list(losses(cell).values())):.3f} ({share:.2f}, {steps:.0f})"


def decide(ladder: Ladder) -> Iterator[str]:
    """What each change of the paper's arm is worth, and the least difference that would be seen."""
    rows, rest, count = [], [], 0
    changes = [change for change in CHANGES if change != "nothing"]
    for change in changes:
        by_size = [paired(ladder.decide(change, size), ladder.decide("nothing", size))
                   for size in ("S", "M")]  # fmt: skip
        there = [values for values in by_size if len(values) > 1]
        if not there:
            continue
        parts = [Estimate.of([value / len(there) for value in values]) for values in there]
        pooled = parts[0].plus(parts[1]) if len(parts) > 1 else parts[0]
        rest += [value - np.mean(values) for values in there for value in values]
        count += len(there)
        cells = [shown(Estimate.of(values)) if values else "" for values in by_size]
        rows.append([change, *cells, shown(pooled), shown(pooled, 0.025 / len(changes))])
    if rows:
        yield table(["changed", "S", "M", "both", f"both, level for {len(changes)} changes"], rows)
        yield from _power(rest, count, len(changes))


def _power(rest: list[float], count: int, changes: int) -> Iterator[str]:
    """Smallest difference that five seeds of two sizes see in four of five cases."""
    spread = math.sqrt(np.square(rest).sum() / (len(rest) - count))
    for level in (0.025, 0.025 / changes):
        seen = (t_quantile(1 - level, 8) + t_quantile(0.8, 8)) * spread / math.sqrt(10)
        yield f"Seen in 80% of cases at level {2 * level:.4f}: {seen:.3f} nats.\n"


def main() -> None:
    """Print tables, or write or compare a prediction."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--predict", nargs=2, metavar=("SIZE", "PREDICTION"))
    parser.add_argument("--compare", type=Path, metavar="PREDICTION")
    arguments = parser.parse_args()
    ladder = Ladder(arguments.file)
    if arguments.predict:
        size, target = arguments.predict
        lines = "".join(f"{json.dumps(each)}\n" for each in predictions(ladder, size))
        write_atomic(Path(target), lines.encode())
    elif arguments.compare:
        made = [json.loads(line) for line in arguments.compare.read_text().splitlines()]
        head = [f"size {made[0]['size']}", "predicted, 95%", "came", "seeds", ""]
        print(table(head, [row for each in made if (row := came(ladder, each))]))
    else:
        sizes = [size for size in SIZES if all(ladder.rung(arm, size, "flop") for arm in ARMS)]
        print("\n".join([*(rungs(ladder, sizes) if sizes else ()), *decide(ladder)]))


if __name__ == "__main__":
    main()
