"""Writes the ladder's results in Markdown, with the prediction of a larger size beside its result.

    python -m benchmarks.ladder_table [FILE] [--predict SIZE PREDICTION | --compare PREDICTION]
    python -m benchmarks.ladder_table [FILE] --equal PREDICTION

Losses are nats, the mean of the held-out corpora. Differences are paired by seed, so that initial
weights and the order of the data cancel. Intervals are 95% t-intervals unless they say otherwise.
A prediction is a straight line over log FLOP, of log loss or of a difference.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder import valid
from benchmarks.ladder_run import (
    ARMS,
    BATCH,
    CHANGES,
    DECIDING,
    EQUAL,
    KINDS,
    LENGTH,
    SIZES,
    Run,
    flop_per_token,
)
from moepp_megatron.runtime.atomic import write_atomic
from moepp_megatron.tools.experiments.statistics import Estimate, t_below, t_quantile

FILE = Path(__file__).parent / "results" / "ladder.jsonl"
LENGTHS = {"steps": "equal steps", "flop": "equal FLOP"}
# Where the arms of equal FFN work were run: stage, size, and the corpora that are compared.
CELLS: dict[str, tuple[str, str, Sequence[str]]] = {
    "S": ("equal", "S", ()),
    "M": ("equal power", "M", ()),
    "L, other texts": ("proof power", "L", ()),
    "XL, other texts": ("beyond", "XL", ()),
    "control": ("control", "S", KINDS["control"]["hard"]),
}
PAIRS = [(arm, "vanilla") for arm in ARMS if arm != "vanilla"]
PAIRS += [("selected", "vanilla selected"), ("selected", "paper"), ("no residual", "paper")]
# An arm, and what it is compared with, if anything.
Row = tuple[str, str]
# Results by stage, arm, size and what was run, and by seed.
Ladder = dict[tuple[str, str, str, str], dict[str, dict[str, Any]]]


def read(file: Path) -> Ladder:
    """The results of a file that the ladder has collected."""
    ladder: Ladder = {}
    for line in file.read_text().splitlines():
        result = json.loads(line)
        run = Run(**result["run"])
        # Only runs on the same texts are paired.
        seed = f"{run.seed} {result['texts']}"
        ladder.setdefault((run.stage, run.arm, run.size, run.what), {})[seed] = result
    return ladder


def rung(ladder: Ladder, arm: str, size: str, what: str) -> dict[str, dict[str, Any]]:
    """Results by seed; vanilla's FLOP are those of its steps."""
    what = "steps" if arm.startswith("vanilla") else what
    return ladder.get(("rungs", arm, size, what)) or ladder.get(("top", arm, size, "flop"), {})


def less(cell: dict[str, Any], other: dict[str, Any], kinds: Sequence[str] = ()) -> list[float]:
    """Loss less that of the other, for each seed that both have; of all texts or of some kinds."""

    def loss(result: dict[str, Any]) -> float:
        return valid({"valid": {kind: result["valid"][kind] for kind in kinds or result["valid"]}})

    return [loss(cell[seed]) - loss(other[seed]) for seed in sorted(cell.keys() & other.keys())]


def values(
    ladder: Ladder, row: Row, size: str, what: str, kinds: Sequence[str] = ()
) -> list[float]:
    """Losses of an arm, or its losses less another arm's, one for each seed."""
    cell = rung(ladder, row[0], size, what)
    if not row[1]:
        return [valid(result) for result in cell.values()]
    return less(cell, rung(ladder, row[1], size, what), kinds)


def line(
    ladder: Ladder, row: Row, sizes: Sequence[str], what: str
) -> tuple[Estimate, Callable[[str, int], Estimate]]:
    """The line through log losses, or differences, of all seeds: slope, and what it predicts.

    Returns:
        The slope for ten times the FLOP, and the mean of so many new seeds at a size.
    """
    found = [(size, value) for size in sizes for value in values(ladder, row, size, what)]
    x = np.array([log_flop(size) for size, _ in found])
    y = np.array([value if row[1] else math.log10(value) for _, value in found])
    far, degrees = x - x.mean(), len(x) - 2
    width = float((far**2).sum())
    slope = float((far * y).sum()) / width
    spread = math.sqrt(float(((y - y.mean() - slope * far) ** 2).sum()) / degrees)

    def at(size: str, seeds: int) -> Estimate:
        far = log_flop(size) - float(x.mean())
        error = spread * math.sqrt(1 / seeds + 1 / len(x) + far**2 / width)
        return Estimate(float(y.mean()) + slope * far, error, degrees)

    return Estimate(slope, spread / math.sqrt(width), degrees), at


def log_flop(size: str) -> float:
    """Decimal logarithm of the FLOP of vanilla's run: those of every arm at equal FLOP."""
    return math.log10(flop_per_token("vanilla", size, 1.0) * SIZES[size].steps * BATCH * LENGTH)


def predictions(ladder: Ladder, size: str) -> Iterator[dict[str, Any]]:
    """Of every loss and difference at a size from the smaller ones, for so many new seeds."""
    sizes = list(SIZES)[: list(SIZES).index(size)]
    for what, row in product(LENGTHS, [*((arm, "") for arm in ARMS), *PAIRS]):
        _, at = line(ladder, row, sizes, what)
        found: dict[str, Any] = {"row": row, "at": what, "size": size, "from": sizes}
        for seeds in (1, 2, 3):
            guess = at(size, seeds)
            far = {"80%": guess.reach(0.1), "95%": guess.reach(0.025)}
            ends = {"mean": (guess.mean,)}
            ends |= {level: (guess.mean - far[level], guess.mean + far[level]) for level in far}
            found[f"{seeds}"] = {
                level: [round(end if row[1] else 10**end, 4) for end in each]
                for level, each in ends.items()
            }
            if row[1]:
                chance = t_below(-guess.mean / (guess.error or math.inf), guess.degrees)
                found[f"{seeds}"]["chance below 0"] = round(chance, 3)
        yield found


def came(ladder: Ladder, prediction: dict[str, Any]) -> list[str]:
    """A row that compares a prediction with what came; empty where nothing has."""
    row, what = prediction["row"], prediction["at"]
    found = values(ladder, row, prediction["size"], what)
    if not found:
        return []
    guess, mean = prediction[f"{len(found)}"], float(np.mean(found))
    inside = [level for level in ("80%", "95%") if guess[level][0] <= mean <= guess[level][1]]
    (low, high), sign = guess["95%"], "+" if row[1] else ""
    expected = f"{guess['mean'][0]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
    verdict = f"inside {inside[0]}" if inside else "outside"
    return [
        f"{LENGTHS[what]}: {name(row)}",
        expected,
        f"{mean:{sign}.3f}",
        f"{len(found)}",
        verdict,
    ]


def name(row: Sequence[str]) -> str:
    """The label of a row."""
    return " less ".join(part for part in row if part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def shown(estimate: Estimate, level: float = 0.025) -> str:
    """A number with its interval, which is wrong on either side with this probability."""
    reach = estimate.reach(level)
    ends = f" ({estimate.mean - reach:+.3f} to {estimate.mean + reach:+.3f})"
    return f"{estimate.mean:+.3f}" + (ends if math.isfinite(reach) else "")


def pooled(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the groups' means, from the spread within groups."""
    means = [float(np.mean(group)) for group in groups]
    degrees = sum(len(group) - 1 for group in groups)
    if degrees == 0:
        return Estimate(float(np.mean(means)))
    rest = sum(float(np.square(np.subtract(group, np.mean(group))).sum()) for group in groups)
    error = math.sqrt(rest / degrees * sum(1 / len(group) for group in groups)) / len(groups)
    return Estimate(float(np.mean(means)), error, degrees)


def rungs(ladder: Ladder, sizes: Sequence[str]) -> Iterator[str]:
    """Losses with FFN share and steps; differences, with slope; differences by kind of text."""
    for what, title in LENGTHS.items():
        rows, by_kind = [], []
        for arm in ARMS:
            rows.append([arm, *(_loss(rung(ladder, arm, size, what)) for size in sizes), "", ""])
        for pair in PAIRS:
            found = [values(ladder, pair, size, what) for size in sizes]
            slope = shown(line(ladder, pair, sizes, what)[0]) if len(sizes) > 1 else ""
            cells = [*(shown(Estimate.of(each)) for each in found), shown(pooled(found)), slope]
            rows.append([name(pair), *cells])
            last = [values(ladder, pair, sizes[-1], what, kinds) for kinds in KINDS["A"].values()]
            by_kind.append([name(pair), *(shown(Estimate.of(each)) for each in last)])
        yield table([title, *sizes, "all sizes", "for ten times the FLOP"], rows)
        yield table([f"{title}, size {sizes[-1]}", *KINDS["A"]], by_kind)


def worth(ladder: Ladder, sizes: Sequence[str]) -> Iterator[str]:
    """Yield the gain of each arm with runs of two lengths from e times the steps."""
    rows = []
    for arm in (arm for arm in ARMS if not arm.startswith("vanilla")):
        rows.append([arm])
        for size in sizes:
            short, long = (rung(ladder, arm, size, what) for what in LENGTHS)
            more = {seed: long[seed]["run"]["steps"] / short[seed]["run"]["steps"] for seed in long}
            found = [less({seed: long[seed]}, short)[0] / math.log(more[seed]) for seed in long]
            rows[-1].append(shown(Estimate.of(found)))
    yield table(["loss for e times the steps", *sizes], rows)


def _loss(cell: dict[str, dict[str, Any]]) -> str:
    loss = np.mean([valid(result) for result in cell.values()])
    share = np.mean([result["share"] for result in cell.values()])
    steps = np.mean([result["run"]["steps"] for result in cell.values()])
    return f"{loss:.3f} (share {share:.2f}, {steps:.0f} steps)"


def decide(ladder: Ladder) -> Iterator[str]:
    """Yield the gain of each change of the paper's arm, and the least difference to be seen.

    "A, B" is less "A".
    """
    changes = [change for change in CHANGES if change != "nothing"]
    rows = []
    for change in changes:
        base = change.rpartition(", ")[0] or "nothing"
        of_size = {
            what: [ladder.get(("decide", "paper", size, what), {}) for size in DECIDING]
            for what in (change, base)
        }
        each = [less(*cells) for cells in zip(of_size[change], of_size[base], strict=True)]
        if not all(each):
            continue
        both = pooled(each)
        far = t_quantile(0.975, both.degrees) + t_quantile(0.8, both.degrees)
        share = {
            what: np.mean([result["share"] for cell in cells for result in cell.values()])
            for what, cells in of_size.items()
        }
        rows.append(
            [
                change,
                *(shown(Estimate.of(found)) for found in each),
                shown(both),
                shown(both, 0.025 / len(changes)),
                f"{far * (both.error or math.nan):.3f}",
                f"{share[change] - share[base]:+.2f}",
            ]
        )
    if rows:
        every = f"both, as one of {len(changes)}"
        seen = "seen in 80% of cases"
        yield table(["changed", *DECIDING, "both", every, seen, "FFN share"], rows)


def equal_work(ladder: Ladder) -> Iterator[str]:
    """Arms of equal FFN work less vanilla with the same gates, and what they spend where."""
    rows, spent = [], []
    for arm, settings in EQUAL.items():
        if not settings.against:
            continue
        found = [_less(ladder, arm, settings.against, *cell) for cell in CELLS.values()]
        both = [each for each in found[:2] if each]
        shares = [
            each["share"] * _topk(arm)
            for each in ladder.get(("equal", arm, "S", "steps"), {}).values()
        ]
        cells = [shown(Estimate.of(each)) if each else "" for each in found]
        rows.append(
            [
                name((arm, settings.against)),
                *cells,
                shown(pooled(both)) if both else "",
                f"{np.mean(shares):.2f}" if shares else "",
            ]
        )
        spent.append([arm, *_spent(ladder, arm)])
    gates = [_less(ladder, "vanilla selected", "vanilla", *cell) for cell in CELLS.values()]
    cells = [shown(Estimate.of(each)) if each else "" for each in gates]
    rows.insert(0, ["vanilla selected less vanilla", *cells, shown(pooled(gates[:2])), ""])
    yield table(["equal FFN work", *CELLS, "S and M", "FFN experts a token"], rows)
    yield table(
        ["FFN experts a token", *KINDS["A"], *KINDS["control"], "spread over 8 ranks"], spent
    )


def _less(
    ladder: Ladder, arm: str, other: str, stages: str, size: str, kinds: Sequence[str]
) -> list[float]:
    cells = [
        {
            seed: x
            for stage in stages.split()
            for seed, x in ladder.get((stage, each, size, "steps"), {}).items()
        }
        for each in (arm, other)
    ]
    return less(*cells, kinds)


def _topk(arm: str) -> int:
    topk: int = EQUAL[arm].moe["router_topk"]
    return topk


def _spent(ladder: Ladder, arm: str) -> Iterator[str]:
    """FFN experts a token by kind of text, on size S and in the control; how ranks differ."""
    for stage, kinds in (("equal", KINDS["A"]), ("control", KINDS["control"])):
        found = ladder.get((stage, arm, "S", "steps"), {}).values()
        for each in kinds.values():
            picks = [result["ffn"][kind] for result in found for kind in each]
            yield f"{np.mean(picks):.2f}" if picks else ""
    spread = [each["spread"] for each in ladder.get(("equal", arm, "S", "steps"), {}).values()]
    yield f"{np.mean(spread):.1%}" if spread else ""


def came_equal(ladder: Ladder, file: Path) -> str:
    """Predictions of arms of equal FFN work, and what came."""
    rows = []
    for line in file.read_text().splitlines():
        said = json.loads(line)
        if "written" in said:
            continue
        stage = said.get("stage", "equal")
        kinds = {"control": KINDS["control"]["hard"]}.get(stage, ())
        found = _less(ladder, said["arm"], said["less"], stage, said["size"], kinds)
        if not found:
            continue
        low, high = said["range"]
        mean = float(np.mean(found))
        place = "inside" if low <= mean <= high else "outside"
        expected = f"{said['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
        label = f"{stage}, {said['size']}: {name((said['arm'], said['less']))}"
        rows.append([label, expected, shown(Estimate.of(found)), place])
    return table(["arm", "predicted", "came", ""], rows)


def main() -> None:
    """Print tables, or write or compare a prediction."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    parser.add_argument("--predict", nargs=2, metavar=("SIZE", "PREDICTION"))
    parser.add_argument("--compare", type=Path, metavar="PREDICTION")
    parser.add_argument("--equal", type=Path, metavar="PREDICTION")
    arguments = parser.parse_args()
    ladder = read(arguments.file)
    if arguments.predict:
        size, target = arguments.predict
        lines = "".join(f"{json.dumps(each)}\n" for each in predictions(ladder, size))
        write_atomic(Path(target), lines.encode())
    elif arguments.equal:
        print("\n".join([*equal_work(ladder), came_equal(ladder, arguments.equal)]))
    elif arguments.compare:
        made = [json.loads(each) for each in arguments.compare.read_text().splitlines()]
        head = [f"size {made[0]['size']}", "predicted, 95%", "came", "seeds", ""]
        print(table(head, filter(None, (came(ladder, each) for each in made))))
    else:
        sizes = [size for size in SIZES if all(rung(ladder, arm, size, "flop") for arm in ARMS)]
        of_rungs = [*rungs(ladder, sizes), *worth(ladder, sizes)] if sizes else []
        print("\n".join([*of_rungs, *decide(ladder)]))


if __name__ == "__main__":
    main()
