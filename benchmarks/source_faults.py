"""A data source of 3 percent that turns bad, in small trainings: who tells, and by name?

    python -m benchmarks.source_faults --out FOLDER [--minutes 60] [--set prove]

The model, the corpora and the resumable results are those of `routing_faults`. Each run has three
data sources with 77, 20 and 3 percent of the sequences; behind step 150 the small one has other
text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fault_corpora import Corpora, Mixed, Mixture
from benchmarks.routing_faults import BATCH, LENGTH, SAVED, Case, work_off

STEPS = 40
SHARES = (0.77, 0.2, 0.03)
SMALL = "small"
# The corpora of the sources of a run, by the first, and what the small one turns into.
_SETS: dict[str, dict[str, tuple[tuple[str, str], tuple[str, ...]]]] = {
    "choose": {
        "prose": (("python", "c"), ("noise", "line")),
        "json": (("french", "perl"), ("russian", "numbers")),
    },
    "prove": {
        "markdown": (("javascript", "xml"), ("noise", "line", "swedish")),
        "cpp": (("html", "german"), ("noise", "cmake")),
    },
}
_SEEDS = {"choose": 301, "prove": 401}
# Rules that are about the data, and those that name a source.
_RULES = ("data_shift", "loss_shift", "token_shift", "source_shift")


def cases(which: str) -> Iterator[Case]:
    """The cases of a set."""
    for seed, (base, (_, others)) in enumerate(_SETS[which].items(), _SEEDS[which]):
        for other in others:
            yield Case("source", base, seed, other, SHARES[2], STEPS)
        yield Case("healthy", base, seed)


def data_of(case: Case, corpora: Corpora) -> Mixed:
    """Three sources; the small one turns into other text behind step 150."""
    ((second, small),) = (sets[case.base][0] for sets in _SETS.values() if case.base in sets)
    kinds = [case.base, second, small]
    schedule: list[tuple[int, Mixture]] = [(1, dict(zip(kinds, SHARES, strict=True)))]
    if case.other:
        bad = dict(zip([case.base, second, case.other], SHARES, strict=True))
        schedule.append((SAVED + 1, bad))
    of = {case.base: 0, second: 1, small: 2} | ({case.other: 2} if case.other else {})
    names = (case.base, second, SMALL)
    return Mixed(corpora, schedule, BATCH, LENGTH, case.seed, of, names)


def row(result: dict[str, Any]) -> str:
    """A line of the table: steps from the change to the first alert of each rule, and the names."""
    case = result["case"]
    begins = [
        alert
        for alert in result["alerts"]
        if alert["step"] > SAVED and alert["rule"] in _RULES and alert["action"] == "warn"
    ]
    first = {alert["rule"]: alert for alert in reversed(begins)}
    told = ", ".join(f"{rule} {alert['step'] - SAVED}" for rule, alert in first.items())
    named = {
        line.split(":")[0].removeprefix("source ")
        for alert in begins
        for line in alert.get("moved") or ()
        if line.startswith("source ")
    }
    what = f"{case['base']} -> 3% {case['other']}" if case["other"] else case["base"]
    return f"| {what} | {told or '-'} | {', '.join(sorted(named)) or '-'} |"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each case, then the false alarms."""
    lines = ["| sources | told after steps | named |", "|---|---|---|", *map(row, results)]
    healthy = [result for result in results if result["case"]["kind"] == "healthy"]
    # Judged from step 80 on.
    steps = sum(len(result["losses"]) + SAVED - 80 for result in healthy)
    alarms = [a for r in healthy for a in r["alerts"] if a["rule"] in _RULES]
    begins = [alert for alert in alarms if alert["action"] == "warn"]
    return "\n".join([*lines, "", f"- healthy: {len(begins)} false alarms in {steps} judged steps"])


def main() -> None:
    """Run what is missing, within the time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", default="prove", choices=sorted(_SETS))
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    # Not among the results of `routing_faults`.
    out, todo = arguments.out, list(cases(arguments.set))
    print(table(work_off(todo, out, f"sources_{arguments.set}", arguments.minutes, data_of)))


if __name__ == "__main__":
    main()
