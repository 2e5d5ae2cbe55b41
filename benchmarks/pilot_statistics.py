"""How often `moepp pilot` decides wrongly: its procedure on made-up pilots whose truth is known.

    python -m benchmarks.pilot_statistics [--pilots 20000] [--json FILE]

Every pilot has runs with a shift of the seed and noise of the run, sessions of speed that are off
by a few per cent, and goes through the code of a real one: pooled losses, steps from the measured
speed, looks, verdict. A pilot that is undecided gets more seeds, up to `LOOKS` looks, as somebody
would who wants an answer. The noise is that of the quickstart's pilot: with three seeds and each
arm's own spread its intervals were 0.054 wide to either side, in log time (docs/LOG.md). That
number set the noise; nothing here set a level, which `schedule.py` has from the union bound.

Columns: wrong "pays" (of the arm if it does not pay), "pays" and "does not pay" at the first look
and in the end, coverage of the 95% interval of the loss after vanilla's time, its half width in log
time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from moepp_megatron.workbench.experiments.pilot import schedule
from moepp_megatron.workbench.experiments.pilot.evidence import Evidence, Names
from moepp_megatron.workbench.experiments.pilot.pooled import PooledLosses
from moepp_megatron.workbench.experiments.pilot.statistics import Estimate
from moepp_megatron.workbench.experiments.pilot.verdict import answer_of

# Nats for an e-fold of tokens, and noise of a run over it.
VALUE = 1.0
NOISE = 0.054 * VALUE / (4.303 * math.sqrt(2.0 / 3.0) * 0.886)
SEED_SHIFT = 3 * NOISE
LOOKS = 4
SHORT = 0.7


@dataclass(frozen=True)
class Case:
    """One kind of pilot.

    Attributes:
        name: What it is.
        gains: Share of vanilla's time that each MoE++ arm truly saves, at equal loss.
        baseline: Share that the narrowed vanilla model saves.
        seeds: Seeds of a look.
        busy: Standard deviation of a session's speed, in log time.
    """

    name: str
    gains: tuple[float, ...]
    baseline: float = 0.0
    seeds: int = 5
    busy: float = 0.01
    sessions: int = 5


CASES = (
    Case("no effect", (0.0,)),
    Case("no effect, narrowed vanilla better by 10%", (0.0,), baseline=0.1),
    Case("no effect, narrowed vanilla worse by 10%", (0.0,), baseline=-0.1),
    Case("the same, 3 tau", (0.0, 0.0, 0.0), baseline=-0.1),
    Case("the same, sessions off by 3%", (0.0,), baseline=-0.1, busy=0.03),
    Case("no effect, 2 tau", (0.0, 0.0)),
    Case("no effect, 3 tau", (0.0, 0.0, 0.0)),
    Case("no effect, looks after 3 seeds", (0.0,), seeds=3),
    Case("no effect, sessions off by 3%", (0.0,), busy=0.03),
    Case("saves 10%, narrowed vanilla as well", (0.1,), baseline=0.1),
    Case("saves 5%", (0.05,)),
    Case("saves 10%", (0.1,)),
    Case("saves 15%", (0.15,)),
    Case("saves 10%, 2 tau", (0.1, 0.1)),
    Case("saves 10%, sessions off by 3%", (0.1,), busy=0.03),
    Case("loses 10%", (-0.1,)),
)


@dataclass
class Row:
    """What became of a case's pilots, as shares of them."""

    name: str
    first_pays: float
    pays: float
    does_not_pay: float
    wrong_pays: float
    coverage: float
    half_width: float


def simulate(case: Case, pilots: int, seed: int) -> Row:
    """Play a case."""
    random = np.random.default_rng(seed)
    found = [_pilot(case, random) for _ in range(pilots)]
    first, last = [one.answers[0] for one in found], [one.answers[-1] for one in found]
    is_null = all(gain <= 0.0 or gain <= case.baseline for gain in case.gains)
    paid = sum(answer == "pays" for answer in last) / pilots
    widths = [one.half_width for one in found]
    return Row(
        case.name,
        sum(answer == "pays" for answer in first) / pilots,
        paid,
        sum(answer == "does not pay" for answer in last) / pilots,
        paid if is_null else 0.0,
        sum(one.covered for one in found) / pilots,
        float(np.mean(widths)),
    )


@dataclass(frozen=True)
class _Played:
    answers: list[str]
    covered: bool
    half_width: float


def _pilot(case: Case, random: np.random.Generator) -> _Played:
    most = LOOKS * case.seeds
    shift = random.normal(0.0, SEED_SHIFT, most)

    def runs(log_time: float) -> dict[int, float]:
        """Losses of an arm that needs exp(log_time) of vanilla's time to its loss."""
        values = VALUE * log_time + shift + random.normal(0.0, NOISE, most)
        return dict(enumerate(map(float, values)))

    log_tokens = -math.log(SHORT)
    losses = {"vanilla": runs(0.0), "short": runs(log_tokens), "more": runs(0.0)}
    speeds: list[Estimate] = []
    for number, gain in enumerate(case.gains):
        # What a step saves does not matter to the statistics; 15% here.
        true_ratio = math.log(0.85)
        off = random.normal(0.0, case.busy, case.sessions)
        speed = Estimate.of([true_ratio + float(one) for one in off])
        speeds.append(speed)
        # Trained for what was taken for vanilla's time.
        in_time = math.log1p(-gain) + (speed.mean - true_ratio)
        losses[f"time {number}"] = runs(in_time)
        losses[f"moepp {number}"] = runs(math.log1p(-gain) - true_ratio)
        losses[f"narrow {number}"] = runs(math.log1p(-case.baseline) - true_ratio)
    answers: list[str] = []
    covered, half_width = True, math.nan
    for look in range(1, LOOKS + 1):
        seeds = range(look * case.seeds)
        pooled = PooledLosses({name: {s: all_[s] for s in seeds} for name, all_ in losses.items()})
        verdicts = []
        for number, gain in enumerate(case.gains):
            names = Names(
                "vanilla", "short", f"moepp {number}", f"time {number}", f"narrow {number}"
            )
            evidence = Evidence.of(pooled, names, log_tokens, speeds[number])
            level = schedule.level(look, len(case.gains))
            signs = [evidence.in_time.sign(level), evidence.in_compute.sign(level)]
            verdicts.append(answer_of(signs))
            if look == 1 and number == 0:
                shown = evidence.in_time.interval()
                assert shown.low is not None
                assert shown.high is not None
                covered = shown.low <= VALUE * math.log1p(-gain) <= shown.high
                half_width = (shown.high - shown.low) / 2 / VALUE
        answers.append(_of_all(verdicts))
        if answers[-1] != "undecided":
            break
    return _Played(answers, covered, half_width)


def _of_all(answers: list[str]) -> str:
    """Somebody takes the best arm."""
    for answer in ("pays", "undecided"):
        if answer in answers:
            return answer
    return "does not pay"


def table(rows: list[Row]) -> Iterator[str]:
    """The table in Markdown."""
    heads = ("pilots", "pays at the first look", "pays in the end", "does not pay")
    yield "| " + " | ".join((*heads, 'wrong "pays"', "coverage", "half width")) + " |"
    yield "|---" * 7 + "|"
    for row in rows:
        yield (
            f"| {row.name} | {row.first_pays:.1%} | {row.pays:.1%} | {row.does_not_pay:.1%} | "
            f"{row.wrong_pays:.2%} | {row.coverage:.1%} | {row.half_width:.3f} |"
        )


def main() -> None:
    """Simulate every case and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pilots", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [
        simulate(case, options.pilots, options.seed + number) for number, case in enumerate(CASES)
    ]
    print("\n".join(table(rows)))
    if options.json is not None:
        content = {"pilots": options.pilots, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
