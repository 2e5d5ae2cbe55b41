"""Compares two profiles: differences with their sizes and causes, and in words.

A kind of communication takes `time = bytes / bandwidth + waiting`, of which work hides a part. A
change of its time, or of the exposed part, is split into these four:

- bytes: the change of bytes at the old bandwidth,
- rate: the new bytes at the new bandwidth instead of the old,
- waiting: the change of waiting for late ranks,
- hiding: the change of the time that work hides (exposed time only).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow

# Of the step: less is named together.
_SMALL = 0.01
# Of the largest cause: less is not named.
_MINOR = 0.25


@dataclass(frozen=True)
class Change:
    """One kind of communication before and after; None where it did not occur.

    Times are microseconds of a rank in a step, or in a call where steps are unknown; of the exposed
    time if `exposed`, else of the whole time.
    """

    before: SummaryRow | None
    after: SummaryRow | None
    exposed: bool

    @property
    def row(self) -> SummaryRow:
        """The row before or after, whichever exists; both are of one kind."""
        row = self.after or self.before
        assert row is not None, "a change has a side"
        return row

    @property
    def before_us(self) -> float:
        """Its (exposed) time before."""
        return self._time(self.before)

    @property
    def after_us(self) -> float:
        """Its (exposed) time after."""
        return self._time(self.after)

    @property
    def us(self) -> float:
        """The change of its (exposed) time."""
        return self.after_us - self.before_us

    def _time(self, row: SummaryRow | None) -> float:
        if row is None:
            return 0.0
        return (row.exposed_us or 0.0) if self.exposed else row.time_us

    @property
    def causes(self) -> dict[str, float]:
        """Microseconds of the change by bytes, rate, waiting and hiding, where these are known."""
        if self.before is None or self.after is None:
            return {}
        before, after = self.before, self.after
        moved = before.transfer_us
        if before.bytes and after.bytes is not None:
            moved *= after.bytes / before.bytes
        seconds = {
            "bytes": moved - before.transfer_us,
            "rate": after.transfer_us - moved,
            "waiting": (after.wait_us or 0.0) - (before.wait_us or 0.0),
        }
        if self.exposed:
            seconds["hiding"] = self.us - (after.time_us - before.time_us)
        return seconds


@dataclass(frozen=True)
class ProfileComparison:
    """Two profiles.

    Attributes:
        before: The one that is compared against.
        after: The other profile.
        unit: Unit of the times: per step, or per call if one profile has no steps.
        changes: Changes by kind, the largest first.
    """

    before: ProfileSummary
    after: ProfileSummary
    unit: str
    changes: tuple[Change, ...]

    @property
    def step_us(self) -> float | None:
        """Change of the time of a step."""
        return _difference(self.before.step_us, self.after.step_us)

    @property
    def parts_us(self) -> dict[str, float]:
        """Change of the step's parts besides exposed communication, as far as they are known.

        The parts are computation and the rest: idle time, and the slowest rank's additional time.
        """
        exposed = _difference(self.before.exposed_us, self.after.exposed_us)
        if self.step_us is None or exposed is None:
            return {}
        compute = _difference(self.before.compute_us, self.after.compute_us)
        if compute is None:
            return {"work and the rest": self.step_us - exposed}
        return {"computation": compute, "neither": self.step_us - exposed - compute}

    def notable(self) -> tuple[list[Change], list[Change]]:
        """Changes of at least 1% of the step (or of the largest time), and the others."""
        whole = self.before.step_us if self.unit == "step" else None
        if whole is None:
            whole = max((max(row.before_us, row.after_us) for row in self.changes), default=0.0)
        large = [row for row in self.changes if abs(row.us) >= _SMALL * whole and row.us]
        return large, [row for row in self.changes if row not in large]


def compare(before: ProfileSummary, after: ProfileSummary) -> ProfileComparison:
    """Compare `after` with `before`."""
    by_step = before.step_us is not None and after.step_us is not None
    old, new = (
        {row.kind: row if by_step else _a_call(row) for row in side.rows}
        for side in (before, after)
    )
    exposed = by_step and all(row.exposed_us is not None for row in [*old.values(), *new.values()])
    changes = [Change(old.get(kind), new.get(kind), exposed) for kind in {**new, **old}]
    changes.sort(key=lambda side: -abs(side.us))
    return ProfileComparison(before, after, "step" if by_step else "call", tuple(changes))


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _a_call(row: SummaryRow) -> SummaryRow:
    """The row of one call: recordings of different length differ in their number."""
    calls = row.calls or 1.0
    per_call = {
        name: None if (value := getattr(row, name)) is None else value / calls
        for name in ("bytes", "time_us", "wait_us")
    }
    return row.model_copy(update={**per_call, "calls": 1.0, "exposed_us": None})


def in_words(comparison: ProfileComparison) -> list[str]:
    """Sentences, the largest change first."""
    large, small = comparison.notable()
    lines = _step_lines(comparison)
    if comparison.before.ranks != comparison.after.ranks:
        lines.append(
            f"They are of {comparison.before.ranks} and {comparison.after.ranks} ranks, so what a "
            "rank does in a step may differ."
        )
    lines += _byte_lines(comparison)
    lines += [f"{kind_name(row.row)}: {_change(row)}." for row in large]
    what = "a step" if comparison.unit == "step" else "the longest call"
    if not large:
        lines.append(f"No kind of communication changed by 1% of {what} or more.")
    elif small:
        total = amount(sum(row.us for row in small))
        kinds = "1 other kind" if len(small) == 1 else f"{len(small)} other kinds"
        lines.append(f"{kinds} changed by less than 1% of {what}, {total} together.")
    return lines


def kind_name(row: SummaryRow) -> str:
    """Name of a kind of communication: `dispatch, forward (all-to-all, expert)`."""
    operation = row.operation.replace("_", "-")
    if not row.purpose:
        return f"{operation} ({row.group})" if row.group else operation
    phase = f", {row.phase}" if row.phase else ""
    return f"{row.purpose}{phase} ({operation}, {row.group})"


def duration(us: float) -> str:
    """Microseconds as readable text."""
    if abs(us) >= 1e6:
        return f"{us / 1e6:.3f} s"
    return f"{us / 1e3:.1f} ms" if abs(us) >= 1e3 else f"{us:.0f} us"


def amount(us: float) -> str:
    """A change as readable text: `1.2 ms more`."""
    return f"{duration(abs(us))} {'more' if us > 0 else 'less'}" if us else "nothing"


def _step_lines(comparison: ProfileComparison) -> list[str]:
    before, after = comparison.before, comparison.after
    if comparison.step_us is None or before.step_us is None or after.step_us is None:
        return ["At least one of them knows no steps: times are of a call."]
    share = f" ({abs(comparison.step_us) / before.step_us:.1%})" if before.step_us else ""
    lines = [
        f"A step takes {duration(after.step_us)} instead of {duration(before.step_us)}: "
        f"{amount(comparison.step_us)}{share}."
    ]
    slowest = min(max(side.step_times_us) for side in (before, after))
    if len(before.step_times_us) + len(after.step_times_us) < 4:
        lines.append("With so few steps, chance can be as large as this: record more of them.")
    elif max(min(side.step_times_us) for side in (before, after)) <= slowest:
        lines.append("Single steps of one are as fast as single steps of the other.")
    if before.exposed_us is not None and after.exposed_us is not None:
        parts = [f"{name}: {amount(us)}" for name, us in comparison.parts_us.items()]
        lines.append(
            f"Exposed communication {duration(before.exposed_us)} -> {duration(after.exposed_us)}; "
            f"{'; '.join(parts)}."
        )
    return lines


def _byte_lines(comparison: ProfileComparison) -> list[str]:
    """Changes of bytes, which are exact, unlike times; the largest first."""
    sums: dict[tuple[str, str], list[float | None]] = defaultdict(lambda: [0.0, 0.0])
    for change in comparison.changes:
        total = sums[change.row.operation, change.row.group]
        for side, row in enumerate((change.before, change.after)):
            own, whole = (row.bytes if row is not None else 0.0), total[side]
            # Unknown if any of them is.
            total[side] = None if own is None or whole is None else whole + own
    known = [(kind, old, new) for kind, (old, new) in sums.items() if old and new]
    unit = "rank's step" if comparison.unit == "step" else "call"
    return [
        f"{operation.replace('_', '-')} ({group}) carries {_size(new)} instead of {_size(old)} in "
        f"a {unit}: {_times(old, new)}."
        for (operation, group), old, new in sorted(known, key=lambda one: -abs(one[2] - one[1]))
        if abs(new / old - 1) >= _SMALL
    ]


def _size(count: float) -> str:
    for unit, name in ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"


def _change(change: Change) -> str:
    exposed = " exposed" if change.exposed else ""
    if change.before is None:
        return f"new, {duration(change.after_us)}{exposed}"
    if change.after is None:
        return f"gone, {duration(change.before_us)}{exposed} before"
    times = f"{duration(change.before_us)} -> {duration(change.after_us)}"
    said = f"{amount(change.us)}{exposed}, {times}"
    causes = _causes(change, change.before, change.after)
    return f"{said}: {', '.join(causes)}" if causes else said


def _causes(change: Change, before: SummaryRow, after: SummaryRow) -> list[str]:
    """The causes of a change, the largest first, including those that counteract it."""
    causes = sorted(change.causes.items(), key=lambda cause: -abs(cause[1]))
    rates = [
        row.bytes / row.transfer_us / 1e3 if row.bytes and row.transfer_us > 0 else None
        for row in (before, after)
    ]
    known = rates[0] is not None and rates[1] is not None
    words = {
        "bytes": lambda us: f"{_times(before.bytes, after.bytes)} ({_signed(us)})",
        "rate": lambda us: (
            f"{f'{rates[0]:.3g} -> {rates[1]:.3g} GB/s' if known else 'the transfer itself'} "
            f"({_signed(us)})"
        ),
        "waiting": lambda us: f"{amount(us)} waiting for late ranks",
        "hiding": lambda us: f"{amount(-us)} hidden by work",
    }
    return [words[name](us) for name, us in causes if us and abs(us) >= _MINOR * abs(causes[0][1])]


def _times(before: float | None, after: float | None) -> str:
    ratio = (after or 0.0) / before if before else 0.0
    if 0.5 <= ratio < 2:
        return f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'fewer'} bytes"
    return f"{ratio:.2g} times the bytes"


def _signed(us: float) -> str:
    return f"{'+' if us > 0 else '-'}{duration(abs(us))}"
