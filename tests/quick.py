"""Chooses the tests of `./launch/test.sh --quick`: short files, and one case of each kind.

Files of tests/unit that take no longer than `SHORT_S` by the record in durations.json, all of them;
a new file is taken for short. What ranks, commands and launchers do is tried on one case of each
kind, `CASES`.
"""

from tests import ROOT
from tests.timetable import recorded

SHORT_S = 2.5
# Not always short by the record, and all that rooms have: experts, interop.
_ALSO = ("tests/unit/test_experts.py", "tests/unit/moe/test_extreme_logits.py")

CASES = {
    "data parallel, distributed optimizer": "parallel/test_matrix.py::test_fast_layout[2 whole]",
    "expert parallel": (
        "parallel/test_matrix.py::test_fast_layout[2 ep2 allgather nonzero capacity]"
    ),
    "pipeline, interleaved, recomputed": (
        "parallel/test_matrix.py::test_fast_layout[2 pp2 interleaved re-moe sequence]"
    ),
    "tensor, expert and context parallel": (
        "parallel/test_matrix.py::test_fast_layout[4 tp2 ep2 cp2 nonzero global capacity]"
    ),
    "tensor parallel experts, deduplicated": (
        "parallel/test_matrix.py::test_fast_layout[4 tp2 ep2 etp2 re-moe dedup]"
    ),
    "vanilla baseline": "parallel/test_matrix.py::test_fast_layout[4 tp2 pp2 ep2 vanilla]",
    "layer against reference, experts split": (
        "parallel/test_layer_layouts.py::test_layer_equals_reference[4-4-2-1-released]"
    ),
    "layer against reference, tensor parallel experts": (
        "parallel/test_layer_layouts.py::test_layer_equals_reference[4-2-2-2-dedup capacity]"
    ),
    "checkpoint of another layout": (
        "parallel/test_checkpoint_reshard.py::test_run_continues_in_another_layout"
        "[tp2-pp2 interleaved]"
    ),
    "numerical guard": (
        "parallel/test_numerical_guard.py::test_refused_batches_leave_no_trace[ep2 bf16]"
    ),
    "routing guard": ("parallel/test_routing_guard.py::test_routers_are_put_back[ep2 bf16]"),
    "budget of FFN experts": (
        "parallel/test_budget.py::test_state_and_losses_are_those_of_one_process[default]"
    ),
    "teacher": "parallel/test_distillation.py::test_every_layout_is_one_process[pp 2]",
    "dispatchers": (
        "parallel/test_dispatchers.py::test_bytes_are_those_of_the_routing[alltoall_dedup-4-2-bf16]"
    ),
    "profile": "parallel/test_profile.py::test_some_ranks",
    "generation": "parallel/test_generate.py::test_equals_scoring_again[sampled-tp2 pp2]",
    "stopping": "parallel/test_signals.py",
    "released scores, gate of two layers": (
        "interop/test_golden_scores.py::test_scores[two_layer_gate-pp2 ep2]"
    ),
    "released scores, Mixtral gate": "interop/test_golden_scores.py::test_scores[mixtral_gate-tp2]",
    "conversion": "interop/test_convert.py",
    "a command": "interop/test_cli.py::test_refusals_are_one_line_and_exit_code_2",
    "the launcher": "faults/test_launch.py::test_a_failed_rank_is_one_line",
}


def short_files():
    """The files of tests/unit that every quick run has."""
    seconds = recorded()
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/unit/**/test_*.py"))
    return [file for file in files if seconds.get(file, 0.0) <= SHORT_S or file in _ALSO]


def chosen():
    """Arguments for pytest, from the root of the repository."""
    return [*short_files(), *(f"tests/{case}" for case in CASES.values())]


def summary():
    """For a reader: what a quick run says."""
    count = len(list(ROOT.glob("tests/**/test_*.py")))
    return (
        f"{len(short_files())} of {count} files, and one case of each kind: {', '.join(CASES)}; "
        "./launch/test.sh runs all"
    )
