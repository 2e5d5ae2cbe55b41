"""Recognises what a path holds, and summarises any recording for a comparison."""

from __future__ import annotations

from pathlib import Path

from moepp_megatron.workbench.profiling.analysis import analyse
from moepp_megatron.workbench.profiling.compare import ProfileComparison, compare
from moepp_megatron.workbench.profiling.formats.sources import Format, read_recording, recognise
from moepp_megatron.workbench.profiling.load import has_kineto
from moepp_megatron.workbench.profiling.step_summary import summarise
from moepp_megatron.workbench.profiling.summary import (
    ProfileSummary,
    read_summary,
    summarise_recording,
)


def records_only_collectives(path: Path) -> bool:
    """Whether a path holds recordings of NCCL or PyTorch alone, none of torch's profiler."""
    return not has_kineto(path) and _is_other_source(path)


def summary_of(path: Path) -> ProfileSummary:
    """The summary of any recording, or one that was written before.

    Raises:
        ProfileError: It cannot be read.
    """
    if has_kineto(path):
        return summarise(analyse(path), run_name(path))
    if path.suffix == ".json" and not _is_other_source(path):
        return read_summary(path)
    return summarise_recording(read_recording(path), run_name(path))


def compared(after: ProfileSummary, against: Path | None) -> ProfileComparison | None:
    """What changed since the recording `against`; None without one."""
    return None if against is None else compare(summary_of(against), after)


def run_name(path: Path) -> str:
    """The name of a run in a comparison: two of one configuration differ by their folders."""
    return path.resolve().name


def _is_other_source(path: Path) -> bool:
    """Whether a file, or one in a folder, is of a source that is not torch's profiler."""
    files = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
    kinds = {recognise(file) for file in files if file.is_file()}
    return bool(kinds - {None, Format.KINETO})
