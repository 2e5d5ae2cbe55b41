"""What changed between two profiles: amounts, causes, words."""

import json
from pathlib import Path

import pytest

from moepp_megatron.workbench.profiling.compare import compare, in_words
from moepp_megatron.workbench.profiling.formats.sources import read_recording
from moepp_megatron.workbench.profiling.summaries import summarise_recording, summary_of
from moepp_megatron.workbench.profiling.summary import ProfileSummary, SummaryRow
from moepp_megatron.workbench.profiling.trace import ProfileError

SAMPLES = Path(__file__).parent / "samples"


def row(purpose: str = "dispatch", **fields) -> SummaryRow:
    values = {
        "purpose": purpose,
        "operation": "all_to_all",
        "group": "expert",
        "phase": "forward",
        "calls": 12.0,
        "bytes": 400e6,
        "time_us": 50000.0,
        "exposed_us": 40000.0,
        "wait_us": 10000.0,
    }
    return SummaryRow(**(values | fields))


def summary(
    name: str, *rows: SummaryRow, steps: tuple[float, ...] = (800e3, 810e3), **fields
) -> ProfileSummary:
    values = {"ranks": 8, "step_times_us": steps, "exposed_us": 90e3, "rows": rows}
    return ProfileSummary(name=name, **(values | fields))


def test_a_change_is_split_into_its_causes():
    before = row()  # transfer 40 ms of 400 MB: 10 GB/s
    after = row(bytes=200e6, time_us=33000.0, wait_us=8000.0, exposed_us=30000.0)  # 25 ms: 8 GB/s
    (change,) = compare(summary("B", before), summary("A", after)).changes
    assert change.us == -10000
    assert change.causes == pytest.approx(
        {"bytes": -20000, "rate": 5000, "waiting": -2000, "hiding": 7000}
    )
    assert sum(change.causes.values()) == pytest.approx(change.us)
    *_, said = in_words(compare(summary("B", before), summary("A", after)))
    assert said == (
        "dispatch, forward (all-to-all, expert): 10.0 ms less exposed, 40.0 ms -> 30.0 ms: "
        "50% fewer bytes (-20.0 ms), 7.0 ms less hidden by work, 10 -> 8 GB/s (+5.0 ms)."
    )


def test_largest_first_whatever_the_direction():
    before = summary(
        "B",
        row("dispatch"),
        row("combine", exposed_us=30000.0),
        row("router", operation="all_reduce", exposed_us=500.0),
    )
    after = summary(
        "A",
        row("dispatch", exposed_us=41000.0),
        row("combine", exposed_us=60000.0),
        row("pipeline", operation="send", exposed_us=9000.0),
    )
    comparison = compare(before, after)
    assert [one.row.purpose for one in comparison.changes] == [
        "combine",
        "pipeline",
        "dispatch",
        "router",
    ]
    large, small = comparison.notable()
    assert [one.row.purpose for one in large] == ["combine", "pipeline"]
    said = in_words(comparison)
    assert "pipeline, forward (send, expert): new, 9.0 ms exposed." in said
    # dispatch took 1 ms more, the router's 0.5 ms are gone.
    assert said[-1] == ("2 other kinds changed by less than 1% of a step, 500 us more together.")
    assert len(small) == 2


def test_what_is_gone():
    said = in_words(compare(summary("B", row()), summary("A", row("combine"))))
    assert "dispatch, forward (all-to-all, expert): gone, 40.0 ms exposed before." in said


def test_chance_is_named():
    few = in_words(compare(summary("B", steps=(800e3,)), summary("A", steps=(700e3, 710e3))))
    assert "With so few steps, chance can be as large as this: record more of them." in few
    crossing = in_words(
        compare(summary("B", steps=(800e3, 900e3)), summary("A", steps=(700e3, 850e3)))
    )
    assert "Single steps of one are as fast as single steps of the other." in crossing
    apart = in_words(compare(summary("B", steps=(800e3, 900e3)), summary("A", steps=(7e5, 75e4))))
    assert not [line for line in apart if "steps" in line]


def test_other_rank_counts_are_named():
    said = in_words(compare(summary("B", ranks=4), summary("A", ranks=8)))
    assert "They are of 4 and 8 ranks" in " ".join(said)


def test_without_steps_calls_are_compared():
    long = summary("B", row(calls=100.0, time_us=5000.0, bytes=100e6), steps=(), exposed_us=None)
    short = summary("A", row(calls=10.0, time_us=1000.0, bytes=10e6), steps=(), exposed_us=None)
    comparison = compare(long, short)
    (change,) = comparison.changes
    assert comparison.unit == "call"
    assert (change.before_us, change.after_us) == (50, 100)
    assert in_words(comparison)[0] == "At least one of them knows no steps: times are of a call."
    assert not change.exposed


def test_what_is_sent_is_said_whatever_the_times_are():
    before = summary("B", row(), row("combine", bytes=3e6), row("router", operation="x"))
    after = summary("A", row(bytes=200e6), row("combine", bytes=4e6), row("router", operation="x"))
    (said,) = [line for line in in_words(compare(before, after)) if "carries" in line]
    assert said == (
        "all-to-all (expert) carries 194.55 MiB instead of 384.33 MiB in a rank's step: "
        "49% fewer bytes."
    )


def test_exposed_times_are_used_only_if_all_are_known():
    comparison = compare(summary("B", row()), summary("A", row(exposed_us=None)))
    assert not comparison.changes[0].exposed
    assert comparison.changes[0].us == 0


def test_rows_of_unknown_size_and_without_time():
    before = row(bytes=None, time_us=0.0, wait_us=None, exposed_us=0.0)
    after = row(bytes=None, time_us=20000.0, wait_us=None, exposed_us=20000.0)
    said = in_words(compare(summary("B", before), summary("A", after)))
    assert said[-1] == (
        "dispatch, forward (all-to-all, expert): 20.0 ms more exposed, 0 us -> 20.0 ms: the "
        "transfer itself (+20.0 ms)."
    )


def test_recordings_of_nccl_s_profilers_can_be_compared():
    recording = read_recording(SAMPLES / "inspector_2_30")
    found = summarise_recording(recording, "sample")
    rows = {(one.operation, one.group): one for one in found.rows}
    exchange = rows["all_to_all", "expert"]
    assert (found.ranks, found.step_us, exchange.calls) == (4, None, 2)
    reduced = rows["all_reduce", "all ranks"]
    assert reduced.bytes == 2 * 4194304
    assert reduced.exposed_us is None
    # Written: ranks 1 to 3 start 30, 5 and 12 us after rank 0 and end with it: the others wait for
    # rank 1 for 30, 25 and 18 us in each of two calls; a mean of four ranks.
    assert reduced.wait_us == pytest.approx(2 * (30 + 25 + 18) / 4, abs=1e-2)
    comparison = compare(found, found)
    assert all(change.us == 0 for change in comparison.changes)
    assert in_words(comparison)[1:] == [
        "No kind of communication changed by 1% of the longest call or more."
    ]


def test_computation_is_told_from_idle_time_where_it_is_known():
    before = summary("B", steps=(100e3, 100e3), exposed_us=20e3, compute_us=70e3)
    after = summary("A", steps=(90e3, 90e3), exposed_us=21e3, compute_us=58e3)
    assert compare(before, after).parts_us == {"computation": -12e3, "neither": 1e3}
    assert "computation: 12.0 ms less; neither: 1.0 ms more." in in_words(compare(before, after))[1]


def test_summaries_are_read_alone_or_within_a_profile(tmp_path):
    written = summary("B", row())
    alone, within = tmp_path / "alone.json", tmp_path / "within.json"
    alone.write_text(written.model_dump_json())
    within.write_text(json.dumps({"other": 1, "summary": written.model_dump(mode="json")}))
    assert summary_of(alone) == summary_of(within) == written


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a whole JSON file"),
        ("[]", "field 'the whole'"),
        ('{"name": "A"}', "field 'ranks': field required"),
        ('{"name": "A", "ranks": 1, "format": 2}', "field 'format'"),
        (
            '{"name": "A", "ranks": 1, "rows": [{"operation": "x", "group": "y", "calls": 1}]}',
            "field 'rows.0.time_us': field required",
        ),
    ],
)
def test_what_is_no_summary_is_named(tmp_path, content, said):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError) as caught:
        summary_of(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "moepp profile --json" in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ProfileError, match="absent.json: no such file or folder"):
        summary_of(tmp_path / "absent.json")
