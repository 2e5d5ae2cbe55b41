"""`moepp profile RUN`: where the communication time of a run goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moepp_megatron.cli.echo import echo
from moepp_megatron.config import ConfigError

if TYPE_CHECKING:
    from moepp_megatron.workbench.profiling.analysis import Profile
    from moepp_megatron.workbench.profiling.compare import ProfileComparison
    from moepp_megatron.workbench.profiling.summary import ProfileSummary


def profile(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run with training.profile_steps, or of torch profiler traces; or a "
            "file or folder of NCCL Inspector, NCCL's profiler plugin or the flight recorder.",
            metavar="RUN",
        ),
    ],
    step: Annotated[
        int | None, typer.Option(help="One recorded step; by default all, and their mean.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Say what changed: another RUN, or FILE of --json.", metavar="RUN"),
    ] = None,
    ceiling: Annotated[
        Path | None,
        typer.Option(
            help="What collectives reach here alone: FILE of moepp bench collectives --json.",
            metavar="FILE",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers there.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for profile.html and the merged trace; by default RUN.", metavar="DIR"
        ),
    ] = None,
) -> None:
    """Say where a run's communication time goes: tables, a page, a trace for Perfetto."""
    from moepp_megatron.workbench.profiling.load import has_kineto

    try:
        if has_kineto(run) or not _is_other_source(run):
            _profile(run, step, against, ceiling, json_file, out)
        else:
            _recording(run, against, json_file)
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be written ({error.strerror}); give --out or --json a place "
            "that can"
        ) from None


def _profile(
    run: Path,
    step: int | None,
    against: Path | None,
    ceiling: Path | None,
    json_file: Path | None,
    out: Path | None,
) -> None:
    """Analyse torch profiler traces."""
    import json

    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.workbench.profiling.analysis import analyse
    from moepp_megatron.workbench.profiling.document import document
    from moepp_megatron.workbench.profiling.measures.ceiling import Ceiling
    from moepp_megatron.workbench.profiling.perfetto import merged_trace
    from moepp_megatron.workbench.profiling.step_summary import measured_peak, summarise
    from moepp_megatron.workbench.report.profile.findings import findings
    from moepp_megatron.workbench.report.profile.page import render
    from moepp_megatron.workbench.report.profile.terminal import print_profile

    peaks = None if ceiling is None else measured_peak(Ceiling.read(ceiling))
    found: Profile = analyse(run, step, peaks)
    numbers = document(found)
    comparison = None if against is None else _compare(summarise(found, _name(run)), against)
    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    page, trace = folder / "profile.html", folder / "profile.perfetto.json.gz"
    html = render(found, numbers, comparison)
    write_atomic(page, html.encode("ascii", "xmlcharrefreplace"))
    write_atomic(trace, merged_trace(found))
    if json_file is not None:
        write_atomic(json_file, json.dumps(numbers, indent=1).encode())
    print_profile(numbers, findings(found))
    _print_comparison(comparison)
    echo(f"page   {page}\ntrace  {trace}  (ui.perfetto.dev)")


def _recording(run: Path, against: Path | None, json_file: Path | None) -> None:
    """Analyse a source that records only collectives."""
    from moepp_megatron.runtime.atomic import write_atomic
    from moepp_megatron.workbench.report.profile.terminal import print_summary

    summary = _summary(run)
    if json_file is not None:
        write_atomic(json_file, summary.model_dump_json(indent=1).encode())
    print_summary(summary)
    _print_comparison(None if against is None else _compare(summary, against))


def _summary(path: Path) -> ProfileSummary:
    """The summary of any recording, for a comparison."""
    from moepp_megatron.workbench.profiling.analysis import analyse
    from moepp_megatron.workbench.profiling.formats.sources import read_recording
    from moepp_megatron.workbench.profiling.load import has_kineto
    from moepp_megatron.workbench.profiling.step_summary import summarise
    from moepp_megatron.workbench.profiling.summary import read_summary, summarise_recording

    if has_kineto(path):
        return summarise(analyse(path), _name(path))
    if path.suffix == ".json" and not _is_other_source(path):
        return read_summary(path)
    return summarise_recording(read_recording(path), _name(path))


def _compare(after: ProfileSummary, against: Path) -> ProfileComparison:
    from moepp_megatron.workbench.profiling.compare import compare

    return compare(_summary(against), after)


def _print_comparison(comparison: ProfileComparison | None) -> None:
    from moepp_megatron.workbench.report.profile_comparison import comparison_text

    if comparison is not None:
        echo(comparison_text(comparison))


def _is_other_source(path: Path) -> bool:
    """Whether a file, or one in a folder, is of a source that is not torch's profiler."""
    from moepp_megatron.workbench.profiling.formats.sources import Format, recognise

    files = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
    kinds = {recognise(file) for file in files if file.is_file()}
    return bool(kinds - {None, Format.KINETO})


def _name(path: Path) -> str:
    """The name of a run in a comparison: two of one configuration differ by their folders."""
    return path.resolve().name
