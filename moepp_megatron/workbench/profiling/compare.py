"""Describes the differences between two profiles in words, the largest first."""

from __future__ import annotations

from moepp_megatron.workbench.profiling.changes import SMALL, Change, ProfileComparison, compare
from moepp_megatron.workbench.profiling.summary import SummaryRow

__all__ = ["ProfileComparison", "amount", "compare", "duration", "in_words", "kind_name"]

# Of the largest cause: less is not named.
_MINOR = 0.25


def in_words(comparison: ProfileComparison) -> list[str]:
    """Sentences, the largest change first."""
    large, small = comparison.notable()
    lines = _step_lines(comparison)
    if comparison.before.ranks != comparison.after.ranks:
        lines.append(
            f"They are of {comparison.before.ranks} and {comparison.after.ranks} ranks: what a "
            "rank does in a step may differ for that alone."
        )
    lines += _byte_lines(comparison)
    lines += [f"{kind_name(one.row)}: {_change(one)}." for one in large]
    what = "a step" if comparison.unit == "step" else "the longest call"
    if not large:
        lines.append(f"No kind of communication changed by 1% of {what} or more.")
    elif small:
        total = amount(sum(one.us for one in small))
        lines.append(f"{_kinds(len(small))} changed by less than 1% of {what}, {total} together.")
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
    if not us:
        return "nothing"
    return f"{duration(abs(us))} {'more' if us > 0 else 'less'}"


def _step_lines(comparison: ProfileComparison) -> list[str]:
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
        parts = [f"{name}: {amount(us)}" for name, us in comparison.parts_us.items()]
        lines.append(
            f"Exposed communication {duration(before.exposed_us)} -> {duration(after.exposed_us)}; "
            f"{'; '.join(parts)}."
        )
    return lines


def _byte_lines(comparison: ProfileComparison) -> list[str]:
    """Changes of bytes, which are exact, unlike times; the largest first."""
    sums: dict[tuple[str, str], list[float]] = {}
    unknown: set[tuple[str, str]] = set()
    for change in comparison.changes:
        kind = change.row.operation, change.row.group
        total = sums.setdefault(kind, [0.0, 0.0])
        for side, row in enumerate((change.before, change.after)):
            if row is not None and row.bytes is None:
                unknown.add(kind)
            elif row is not None:
                total[side] += row.bytes or 0.0
    unit = "rank's step" if comparison.unit == "step" else "call"
    said = []
    for kind, (before, after) in sorted(sums.items(), key=lambda one: -abs(one[1][1] - one[1][0])):
        if kind not in unknown and before and after and abs(after / before - 1) >= SMALL:
            operation, group = kind[0].replace("_", "-"), kind[1]
            said.append(
                f"{operation} ({group}) carries {_size(after)} instead of {_size(before)} in a "
                f"{unit}: {_times(before, after)}."
            )
    return said


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
    said = (
        f"{amount(change.us)}{exposed}, {duration(change.before_us)} -> {duration(change.after_us)}"
    )
    causes = _causes(change, change.before, change.after)
    return f"{said}: {', '.join(causes)}" if causes else said


def _causes(change: Change, before: SummaryRow, after: SummaryRow) -> list[str]:
    """The causes of a change, the largest first, including those that counteract it."""
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


def _rates(before: SummaryRow, after: SummaryRow) -> str:
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
