"""Computes the differences between two profiles, with their sizes and causes.

A kind of communication takes `time = bytes / bandwidth + waiting`, of which work hides a part. A
change of its time, or of the exposed part, is split into these four:

- bytes: the change of bytes at the old bandwidth,
- rate: the new bytes at the new bandwidth instead of the old,
- waiting: the change of waiting for late ranks,
- hiding: the change of the time that work hides (exposed time only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow

# Of the step: less is named together.
SMALL = 0.01


@dataclass(frozen=True)
class Change:
    """One kind of communication before and after; None where it did not occur.

    Times are microseconds of a rank in a step, or in a call where steps are unknown.

    Attributes:
        before: The row in the profile that is compared against.
        after: The row in the other profile.
        exposed: Whether the change is of exposed time, not of the whole time.
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
        return _time(self.before, self.exposed)

    @property
    def after_us(self) -> float:
        """Its (exposed) time after."""
        return _time(self.after, self.exposed)

    @property
    def us(self) -> float:
        """The change of its (exposed) time."""
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
            whole = max((max(one.before_us, one.after_us) for one in self.changes), default=0.0)
        large = [one for one in self.changes if abs(one.us) >= SMALL * whole and one.us]
        return large, [one for one in self.changes if one not in large]


def compare(before: ProfileSummary, after: ProfileSummary) -> ProfileComparison:
    """Compare `after` with `before`."""
    by_step = before.step_us is not None and after.step_us is not None
    old, new = _by_kind(before, by_step), _by_kind(after, by_step)
    rows = [*old.values(), *new.values()]
    exposed = by_step and all(row.exposed_us is not None for row in rows)
    changes = [
        Change(old.get(kind), new.get(kind), exposed) for kind in dict.fromkeys([*new, *old])
    ]
    changes.sort(key=lambda one: -abs(one.us))
    return ProfileComparison(before, after, "step" if by_step else "call", tuple(changes))


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _by_kind(summary: ProfileSummary, by_step: bool) -> dict[tuple[str, str, str, str], SummaryRow]:
    return {row.kind: row if by_step else _a_call(row) for row in summary.rows}


def _a_call(row: SummaryRow) -> SummaryRow:
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


def _time(row: SummaryRow | None, exposed: bool) -> float:
    if row is None:
        return 0.0
    return (row.exposed_us or 0.0) if exposed else row.time_us


def total_of(changes: Sequence[Change]) -> float:
    """Sum of changes in microseconds."""
    return sum(change.us for change in changes)
