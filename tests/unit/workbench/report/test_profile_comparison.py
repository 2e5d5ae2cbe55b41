"""The plot and text of a comparison of profiles."""

import pytest

from moepp_megatron.workbench.profiling.compare import ProfileComparison, compare
from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow
from moepp_megatron.workbench.report.drawing import plot_style
from moepp_megatron.workbench.report.profile_comparison import comparison_figure


def row(purpose: str, exposed_us: float | None, time_us: float) -> SummaryRow:
    return SummaryRow(
        purpose=purpose,
        operation="all_to_all",
        group="expert",
        phase="forward",
        calls=1,
        bytes=1e6,
        time_us=time_us,
        exposed_us=exposed_us,
    )


def comparison(hidden: bool = True) -> ProfileComparison:
    def side(name: str, step: float, exposed: float, *rows: SummaryRow) -> ProfileSummary:
        return ProfileSummary(
            name=name, ranks=2, step_times_us=(step,), exposed_us=exposed, rows=rows
        )

    def times(exposed: float, whole: float) -> tuple[float | None, float]:
        return (exposed if hidden else None), whole

    before = side(
        "before",
        100e3,
        30e3,
        row("dispatch", *times(20e3, 25e3)),
        row("combine", *times(1e4, 12e3)),
    )
    after = side(
        "after", 90e3, 27e3, row("dispatch", *times(12e3, 24e3)), row("combine", *times(15e3, 15e3))
    )
    return compare(before, after)


def test_a_bar_for_each_change_the_largest_on_top():
    with plot_style():
        axes = comparison_figure(comparison()).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [
        "dispatch, forward (all-to-all, expert)",
        "work and the rest",
        "combine, forward (all-to-all, expert)",
    ]
    # Exposed in ms; the step lost 10 ms, of which exposed communication 3.
    assert [bar.get_width() for bar in axes.patches] == [-8, -7, 5]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert marks == [-1, 3]
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    assert top < 0 < bottom


def test_whole_times_where_nothing_is_known_of_work():
    with plot_style():
        axes = comparison_figure(comparison(hidden=False)).axes[0]
    widths = {
        label.get_text(): bar.get_width()
        for label, bar in zip(axes.get_yticklabels(), axes.patches, strict=True)
    }
    assert widths["combine, forward (all-to-all, expert)"] == 3
    assert axes.get_xlabel() == "change of time in a rank's step [ms]"


def test_many_kinds_are_summed_up():
    rows = [row(f"part {number}", 1000.0 * (number + 2), 1e5) for number in range(20)]
    before = ProfileSummary(name="b", ranks=1, step_times_us=(1e5,), rows=())
    after = ProfileSummary(name="a", ranks=1, step_times_us=(1e5,), rows=tuple(rows))
    with plot_style():
        axes = comparison_figure(compare(before, after)).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 15
    assert names[-1] == "6 other kinds"
    assert axes.patches[-1].get_width() == pytest.approx(2 + 3 + 4 + 5 + 6 + 7)
