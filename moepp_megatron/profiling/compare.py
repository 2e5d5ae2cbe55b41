"""What changed between two profiles, by how much, and why.

A kind of communication takes `time = bytes / bandwidth + waiting`, of which work hides a part. A
change of its time, or of the exposed part, is split into these four:

- bytes: the change of bytes at the old bandwidth,
- rate: the new bytes at the new bandwidth instead of the old,
- waiting: for late ranks,
- hiding: what work hid more or less than before (exposed time only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.profiling.summary import Row, Summary

# Of the step: less is named together.
_SMALL = 0.01
# Of the largest cause: less is not named.
_MINOR = 0.25


@dataclass(frozen=True)
class Change:
    """One kind of communication before and after; None where it did not occur.

    Times are microseconds of a rank in a step, or in a call where steps are unknown.

    Attributes:
        before: In the profile that is compared against.
        after: In the other.
        exposed: Whether the change is that of exposed time, not of all of its time.
    """

    before: Row | None
    after: Row | None
    exposed: bool

    @property
    def row(self) -> Row:
        """Either, for its kind."""
        row = self.after or self.before
        assert row is not None, "a change has a side"
        return row

    @property
    def before_us(self) -> float:
        """Its (exposed) time before."""
        return _time(self.before, self.exposed)

    @property
    def after_us(self) -> float:
        """Its (exposed) time after."""
        return _time(self.after, self.exposed)

    @property
    def us(self) -> float:
        """By how much it changed."""
        return self.after_us - self.before_us

    @property
    def causes(self) -> dict[str, float]:
        """Microseconds of the change by bytes, rate, waiting and hiding, where these are known."""
        if self.before is None or self.after is None:
            return {}
        before, after = self.before, self.after
        moved = before.transfer_us
        if before.bytes and after.bytes is not None:
            moved *= after.bytes / before.bytes
        found = {
            "bytes": moved - before.transfer_us,
            "rate": after.transfer_us - moved,
            "waiting": (after.wait_us or 0.0) - (before.wait_us or 0.0),
        }
        if self.exposed:
            found["hiding"] = self.us - (after.time_us - before.time_us)
        return found


@dataclass(frozen=True)
class Comparison:
    """Two profiles.

    Attributes:
        before: The one that is compared against.
        after: The other.
        unit: What times are of: a step, or a call where one of them knows no steps.
        changes: By kind, the largest first.
    """

    before: Summary
    after: Summary
    unit: str
    changes: tuple[Change, ...]

    @property
    def step_us(self) -> float | None:
        """Change of the time of a step."""
        if self.before.step_us is None or self.after.step_us is None:
            return None
        return self.after.step_us - self.before.step_us

    @property
    def rest_us(self) -> float | None:
        """Change of what is not exposed communication: work, and what neither is."""
        exposed = (self.before.exposed_us, self.after.exposed_us)
        if self.step_us is None or exposed[0] is None or exposed[1] is None:
            return None
        return self.step_us - (exposed[1] - exposed[0])

    def notable(self) -> tuple[list[Change], list[Change]]:
        """Changes of at least a hundredth of the step (or of the largest time), and the others."""
        whole = self.before.step_us if self.unit == "step" else None
        if whole is None:
            whole = max((max(one.before_us, one.after_us) for one in self.changes), default=0.0)
        large = [one for one in self.changes if abs(one.us) >= _SMALL * whole and one.us]
        return large, [one for one in self.changes if one not in large]


def compare(before: Summary, after: Summary) -> Comparison:
    """Compares `after` against `before`."""
    by_step = before.step_us is not None and after.step_us is not None
    old, new = _by_kind(before, by_step), _by_kind(after, by_step)
    rows = [*old.values(), *new.values()]
    exposed = by_step and all(row.exposed_us is not None for row in rows)
    changes = [
        Change(old.get(kind), new.get(kind), exposed) for kind in dict.fromkeys([*new, *old])
    ]
    changes.sort(key=lambda one: -abs(one.us))
    return Comparison(before, after, "step" if by_step else "call", tuple(changes))


def _by_kind(summary: Summary, by_step: bool) -> dict[tuple[str, str, str, str], Row]:
    return {row.kind: row if by_step else _a_call(row) for row in summary.rows}


def _a_call(row: Row) -> Row:
    """The row of one call: recordings of different length differ in their number."""
    calls = row.calls or 1.0
    return row.model_copy(
        update={
            "calls": 1.0,
            "bytes": None if row.bytes is None else row.bytes / calls,
            "time_us": row.time_us / calls,
            "exposed_us": None,
            "wait_us": None if row.wait_us is None else row.wait_us / calls,
        }
    )


def _time(row: Row | None, exposed: bool) -> float:
    if row is None:
        return 0.0
    return (row.exposed_us or 0.0) if exposed else row.time_us


def in_words(comparison: Comparison) -> list[str]:
    """Sentences, the largest change first."""
    large, small = comparison.notable()
    lines = _step_lines(comparison)
    if comparison.before.ranks != comparison.after.ranks:
        lines.append(
            f"They are of {comparison.before.ranks} and {comparison.after.ranks} ranks: what a "
            "rank does in a step may differ for that alone."
        )
    lines += [f"{kind_name(one.row)}: {_change(one)}." for one in large]
    what = "a step" if comparison.unit == "step" else "the longest call"
    if not large:
        lines.append(f"No kind of communication changed by 1% of {what} or more.")
    elif small:
        total = amount(sum(one.us for one in small))
        lines.append(f"{_kinds(len(small))} changed by less than 1% of {what}, {total} together.")
    return lines


def kind_name(row: Row) -> str:
    """A kind of communication for people: `dispatch, forward (all-to-all, expert)`."""
    operation = row.operation.replace("_", "-")
    if not row.purpose:
        return f"{operation} ({row.group})" if row.group else operation
    phase = f", {row.phase}" if row.phase else ""
    return f"{row.purpose}{phase} ({operation}, {row.group})"


def duration(us: float) -> str:
    """Microseconds for people."""
    if abs(us) >= 1e6:
        return f"{us / 1e6:.3f} s"
    return f"{us / 1e3:.1f} ms" if abs(us) >= 1e3 else f"{us:.0f} us"


def amount(us: float) -> str:
    """A change for people: `1.2 ms more`."""
    if not us:
        return "nothing"
    return f"{duration(abs(us))} {'more' if us > 0 else 'less'}"


def _step_lines(comparison: Comparison) -> list[str]:
    before, after = comparison.before, comparison.after
    if comparison.step_us is None or before.step_us is None or after.step_us is None:
        return ["At least one of them knows no steps: times are of a call."]
    share = f" ({abs(comparison.step_us) / before.step_us:.1%})" if before.step_us else ""
    lines = [
        f"A step takes {duration(after.step_us)} instead of {duration(before.step_us)}: "
        f"{amount(comparison.step_us)}{share}."
    ]
    overlap = max(min(before.step_times_us), min(after.step_times_us)) <= min(
        max(before.step_times_us), max(after.step_times_us)
    )
    if len(before.step_times_us) + len(after.step_times_us) < 4:
        lines.append("With so few steps, chance can be as large as this: record more of them.")
    elif overlap:
        lines.append("Single steps of one are as fast as single steps of the other.")
    if before.exposed_us is not None and after.exposed_us is not None:
        rest = comparison.rest_us or 0.0
        lines.append(
            f"Exposed communication {duration(before.exposed_us)} -> {duration(after.exposed_us)}; "
            f"work and the rest: {amount(rest)}."
        )
    return lines


def _change(change: Change) -> str:
    exposed = " exposed" if change.exposed else ""
    if change.before is None:
        return f"new, {duration(change.after_us)}{exposed}"
    if change.after is None:
        return f"gone, {duration(change.before_us)}{exposed} before"
    said = (
        f"{amount(change.us)}{exposed}, {duration(change.before_us)} -> {duration(change.after_us)}"
    )
    causes = _causes(change, change.before, change.after)
    return f"{said}: {', '.join(causes)}" if causes else said


def _causes(change: Change, before: Row, after: Row) -> list[str]:
    """What made a change, the largest first; what outweighs it included."""
    causes = change.causes
    largest = max(abs(us) for us in causes.values())
    said = []
    for name, us in sorted(causes.items(), key=lambda cause: -abs(cause[1])):
        if not us or abs(us) < _MINOR * largest:
            continue
        if name == "bytes":
            said.append(f"{_times(before.bytes, after.bytes)} ({_signed(us)})")
        elif name == "rate":
            said.append(f"{_rates(before, after)} ({_signed(us)})")
        elif name == "waiting":
            said.append(f"{amount(us)} waiting for late ranks")
        else:
            said.append(f"{amount(-us)} hidden by work")
    return said


def _times(before: float | None, after: float | None) -> str:
    ratio = (after or 0.0) / before if before else 0.0
    if 0.5 <= ratio < 2:
        return f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'fewer'} bytes"
    return f"{ratio:.2g} times the bytes"


def _rates(before: Row, after: Row) -> str:
    rates = [
        row.bytes / row.transfer_us / 1e3 if row.bytes and row.transfer_us > 0 else None
        for row in (before, after)
    ]
    if rates[0] is None or rates[1] is None:
        return "the transfer itself"
    return f"{rates[0]:.3g} -> {rates[1]:.3g} GB/s"


def _signed(us: float) -> str:
    return f"{'+' if us > 0 else '-'}{duration(abs(us))}"


def _kinds(count: int) -> str:
    return "1 other kind" if count == 1 else f"{count} other kinds"


def total_of(changes: Sequence[Change]) -> float:
    """Sum of changes in microseconds."""
    return sum(change.us for change in changes)
