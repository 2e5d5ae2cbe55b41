"""Prints the routing guard's verdict on each run of `guard_runs`, then the sums.

    python -m benchmarks.guard_table FOLDER [--set choose] [--live]

Without `--live` the recorded series are played to `ShiftMonitor`, in seconds; nothing acts. With it
the alerts of runs in which the guard acted are counted, and losses and FFN shares compared.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fault_corpora import VOCAB_SIZE
from benchmarks.guard_runs import FAULTS, OF_MODEL, SAVED, SETS, Case, cases, fault_of
from benchmarks.markdown import table
from moepp_megatron.observe.shift.monitor import GROUPS, Observed, ShiftMonitor, group_of

# Of each kind of event the steps within which it is to be reported, and its cause.
_EXPECTED = {
    "switch": (5, "data"),
    "mixture": (30, "data"),
    "router fault": (10, "router"),
    "other fault": (10, "unknown"),
    "second switch": (10, "data"),
    "second fault": (10, "router"),
}
_JUDGED = 80


@dataclass
class Found:
    """The findings of a case; steps are counted from the end of its base run.

    Attributes:
        case: The case.
        at: Steps before the event, of a pair before the second: fewer than batches where some were
            refused.
        causes: Step, cause and first suspect step of every event and every change of its cause.
        actions: Steps of actions beyond warning.
        steps: Steps that were judged.
        rest: Further text of its line.
        ended: Why the run ended early.
    """

    case: Case
    at: int
    causes: list[tuple[int, str, int]] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    steps: int = 0
    rest: str = ""
    ended: str = ""

    @property
    def kind(self) -> str:
        """Kind of the event, of a pair of the second one."""
        fault, at = fault_of(self.case)
        is_last = fault and at == _batches(self.case)
        if is_last and fault in OF_MODEL:
            return "other fault"
        if self.case.kind == "pair":
            nothing = self.case.what.split()[1] == "healthy"
            return "nothing second" if nothing else "second fault" if is_last else "second switch"
        return "router fault" if is_last else self.case.kind

    def _after(self) -> list[tuple[int, str, int]]:
        """`causes` from the event on, of a pair the second; steps are counted from there."""
        at = self.at
        return [(step - at, cause, since - at) for step, cause, since in self.causes if step > at]

    @property
    def first_alert(self) -> int | None:
        """Steps from the event to its first alert."""
        return min((step for step, *_ in self._after()), default=None)

    @property
    def late(self) -> str:
        """Return the number of steps from the event to `since`."""
        return next((str(since - 1) for *_, since in self._after()), "")

    @property
    def cause(self) -> str | None:
        """Return the cause named by the tenth step, or the first one named later."""
        early = [cause for step, cause, _ in self._after() if step <= 10]
        return early[-1] if early else next((cause for _, cause, _ in self._after()), None)

    @property
    def is_wrong(self) -> bool:
        """True if the guard acted where no weights were damaged."""
        fault, at = fault_of(self.case)
        # A fault that comes first has been undone when the second event comes; an alert about
        # refused batches has the number of the step before them.
        first, last = (self.at, 10**9) if at == _batches(self.case) else (0, self.at)
        return any(not (fault and first <= step <= last) for step in self.actions)


def _batches(case: Case) -> int:
    """Batches before the event, of a pair before the second."""
    return int(case.what.split()[2]) if case.kind == "pair" else 0


def observed(series: dict[str, NDArray[Any]]) -> Iterator[Observed]:
    """The steps of a recorded run, as a monitor sees them."""
    groups = group_of(np.arange(VOCAB_SIZE))
    for step, losses in enumerate(series["losses"].astype(np.float64)):
        yield Observed(
            series["selected"][step].astype(np.float64),
            float(losses.mean()),
            float(losses.std(ddof=1)),
            series["logits"][step],
            np.bincount(groups, weights=series["tokens"][step], minlength=GROUPS),
        )


def replay(case: Case, work: Path) -> Found:
    """Play a recorded case to a monitor; what routers have become is taken as usual."""
    base = work / f"base {case.base.name}.npz"
    found, last = Found(case, _batches(case)), None
    monitor = ShiftMonitor(10_000.0, (1, 2, 3), [f"expert {index}" for index in range(12)])
    runs = [dict(np.load(path)) for path in (base, work / f"{case.name}.npz")]
    for step, each in enumerate((step for run in runs for step in observed(run)), 1 - SAVED):
        monitor.add(step + SAVED, each)
        event = monitor.event
        if event is not None and event.cause != last:
            found.causes.append((step, event.cause, event.since - SAVED))
        last = None if event is None else event.cause
        if monitor.fault > 1.0:
            found.actions.append(step)
            monitor.resolve_fault(is_mended=False)
        found.steps += step + SAVED >= _JUDGED
    return found


def live(case: Case, work: Path) -> Found:
    """Return the outcome of a run in which the guard acted."""
    base = json.loads((work / f"base {case.base.name}.json").read_text())
    result = json.loads((work / f"{case.name}.json").read_text())
    before = _batches(case)
    at = result["step"][before - 1] - SAVED if before else 0
    found = Found(case, at, ended=result["ended"])
    shifts = ("shift", "router_fault")
    for alert in result["alerts"]:
        step = alert["step"] - SAVED
        if alert["rule"] in shifts and alert["severity"] != "info" and "cause" in alert:
            found.causes.append((step, alert["cause"], alert["since"] - SAVED))
        if alert["action"].split()[0] in ("put_back", "rollback", "stop"):
            found.actions.append(step)
        elif alert["rule"] == "numerical_guard":
            found.rest += " refused" * ("refused" not in found.rest)
    found.steps = len(base["losses"]) + len(result["losses"]) - _JUDGED
    found.rest += _excess(case, result, work) + _budget(case, result)
    return found


def _excess(case: Case, result: dict[str, Any], work: Path) -> str:
    """Loss of a fault's run above the healthy run's, around 5, 30 and 60 steps on."""
    healthy = work / f"{Case(case.base, 'healthy').name}.json"
    if case.kind != "fault" or not healthy.exists():
        return ""
    usual = json.loads(healthy.read_text())
    by_step = dict(zip(usual["step"], usual["losses"], strict=True))
    own = dict(zip(result["step"], result["losses"], strict=True))
    excess = np.array([own[step] - by_step[step] for step in sorted(own.keys() & by_step.keys())])
    means = [excess[max(at - 5, 0) : at + 5].mean() for at in (5, 30, 55)]
    return " loss " + ", ".join(f"{mean:+.3f}" for mean in means)


def _budget(case: Case, result: dict[str, Any]) -> str:
    """Return the distance of the worst layer's mean share from a budget."""
    if not case.base.layers.startswith("share"):
        return ""
    target = float(case.base.layers.split()[1])
    shares = np.array(result["shares"])[-30:].mean(axis=0)
    return f" budget {np.abs(shares / target - 1.0).max():.1%}"


def row(found: Found) -> list[str]:
    """A row of the table."""
    first = "-" if found.first_alert is None else str(found.first_alert)
    acted = ", ".join(map(str, found.actions[:3])) or "-"
    rest = found.rest.strip() + (f" ENDED {found.ended}" if found.ended else "")
    return [found.case.name, first, found.cause or "-", acted, found.late, rest]


def sums(all_found: list[Found]) -> Iterator[str]:
    """Yield a line of sums for each kind of event."""
    for kind, (within, cause) in _EXPECTED.items():
        group = [found for found in all_found if found.kind == kind]
        in_time = sum((found.first_alert or 10**9) <= within for found in group)
        right = sum(found.cause == cause for found in group)
        yield (
            f"- {kind}: {in_time} of {len(group)} in {within} steps, cause right in "
            f"{right}, something done in {sum(bool(found.actions) for found in group)}"
        )
    yield f"- something done where no weights were damaged: {sum(f.is_wrong for f in all_found)}"
    healthy = [found for found in all_found if found.kind == "healthy"]
    alerts = sum(len(found.causes) for found in healthy)
    actions = sum(len(found.actions) for found in healthy)
    steps = sum(found.steps for found in healthy)
    yield f"- healthy: {alerts} alerts and {actions} actions in {steps:,} judged steps"
    yield f"- runs that ended: {sum(bool(found.ended) for found in all_found)}"


def main() -> None:
    """Print the table of what is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", default="choose", choices=sorted(SETS))
    parser.add_argument("--live", action="store_true")
    arguments = parser.parse_args()
    assert FAULTS.keys() == SETS.keys(), "every set has its faults"
    work = arguments.out / (arguments.set + ("-live" if arguments.live else ""))
    end, judge = (".json", live) if arguments.live else (".npz", replay)
    there = [case for case in cases(arguments.set) if (work / f"{case.name}{end}").exists()]
    all_found = [judge(case, work) for case in there]
    head = ("run", "reported", "cause", "acted", "since late", "after")
    print("\n".join([table(head, map(row, all_found)), *sums(all_found)]))


if __name__ == "__main__":
    main()
