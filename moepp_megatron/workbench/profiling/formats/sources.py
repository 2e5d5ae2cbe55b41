"""Recognises the format of a profile and reads its collectives, rank by rank."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from moepp_megatron.workbench.profiling.collective import Collective
from moepp_megatron.workbench.profiling.formats.flight_recorder import read_flight_record
from moepp_megatron.workbench.profiling.formats.inspector import read_inspector
from moepp_megatron.workbench.profiling.formats.kineto import read_kineto
from moepp_megatron.workbench.profiling.formats.records import SourceError, read_bytes

# Enough for the first record of each format, whatever it holds.
_HEAD = 65536
# A file of this name beside others says that they were written from documentation.
SYNTHETIC_MARK = "SYNTHETIC"


class Format(StrEnum):
    """A format of collectives, by the name that messages give it."""

    KINETO = "torch profiler traces (Kineto)"
    INSPECTOR = "NCCL Inspector logs"
    FLIGHT_RECORDER = "torch flight-recorder dumps"


@dataclass(frozen=True)
class Recording:
    """A recording that was read.

    Attributes:
        format: Format of the files.
        files: The files it was read from.
        by_rank: Collectives of each global rank in the order of their start, by its own clock.
    """

    format: Format
    files: tuple[Path, ...]
    by_rank: dict[int, list[Collective]]


# What an unsupported file looks like, and what to do about it.
_STRANGERS = (
    (re.compile(rb"SQLite format 3\x00"), "an SQLite database such as Nsight Systems exports"),
    (re.compile(rb"\x7fELF"), "a program"),
    (re.compile(rb"PK\x03\x04"), "a zip archive; unpack it"),
    (
        re.compile(rb"(# (HELP|TYPE) )?nccl_(bus_bandwidth|collective|p2p)_"),
        "NCCL Inspector's Prometheus metrics, which are averages; record with "
        "NCCL_INSPECTOR_PROM_DUMP=0",
    ),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer; fetch the file itself"),
)


def recognise(path: Path) -> Format | None:
    """The format of a file by its content; None for anything else, an empty file included.

    Raises:
        SourceError: The file cannot be read.
    """
    head = read_bytes(path, _HEAD).lstrip()
    if head.startswith(b"{") and re.search(rb'"(coll|p2p)_perf"\s*:|^{\s*"header"\s*:', head):
        return Format.INSPECTOR
    if head.startswith(b"{") and re.search(rb'"(traceEvents|schemaVersion)"\s*:', head):
        return Format.KINETO
    if head.startswith(b"{") and re.search(rb'"(entries|pg_config|comm_lib_version)"\s*:', head):
        return Format.FLIGHT_RECORDER
    if head.startswith(b"\x80") and b"pg_config" in read_bytes(path):
        return Format.FLIGHT_RECORDER
    return None


def read_recording(path: Path) -> Recording:
    """Reads a file, or all files of a folder that have a known format.

    Args:
        path: A file, or a folder with the files of all ranks in one format; others in it are left
            alone. Files from a folder with a file named SYNTHETIC are marked so.

    Returns:
        Collectives by rank, each by its own clock (`merge.find_clocks` compares them).

    Raises:
        SourceError: If nothing can be read; says what it looks like and what is supported.
    """
    formats = {file: recognise(file) for file in _files(path)}
    by_format: dict[Format, list[Path]] = defaultdict(list)
    for file, found in formats.items():
        if found is not None:
            by_format[found].append(file)
    if len(by_format) > 1:
        several = "; ".join(f"{name}: {files[0].name}" for name, files in by_format.items())
        raise SourceError(f"{path}: holds several formats ({several}); give one of them")
    if not by_format:
        raise SourceError(_unknown(path, list(formats)))
    ((kind, files),) = by_format.items()
    by_rank: dict[int, list[Collective]] = defaultdict(list)
    for one in _read(kind, files):
        by_rank[one.rank].append(one)
    for collectives in by_rank.values():
        collectives.sort(key=lambda one: one.start_us)
    return Recording(kind, tuple(files), dict(sorted(by_rank.items())))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    return [path]


def _read(kind: Format, files: Sequence[Path]) -> list[Collective]:
    if kind is Format.INSPECTOR:
        found = read_inspector(files)
    elif kind is Format.FLIGHT_RECORDER:
        found = [one for file in _one_a_rank(files) for one in read_flight_record(file)]
    else:
        found = [one for file in files for one in read_kineto(file).collectives]
    if any((file.parent / SYNTHETIC_MARK).exists() for file in files):
        return [replace(one, synthetic=True) for one in found]
    return found


def _one_a_rank(files: Sequence[Path]) -> list[Path]:
    """Leave out the pickles of ranks that have JSON too, since a hang writes both."""
    named = {file: re.search(r"(\d+)\D*$", file.name) for file in files}
    ranks = {file: name[1] for file, name in named.items() if name is not None}
    as_json = {ranks.get(file) for file in files if ".json" in file.suffixes}
    return [file for file in files if ".json" in file.suffixes or ranks.get(file) not in as_json]


def _unknown(path: Path, files: Sequence[Path]) -> str:
    supported = "supported are " + ", ".join(Format)
    if path.is_dir():
        names = ", ".join(file.name for file in files[:3]) or "nothing"
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"{path}: a folder without a known profile (holds {names}{more}); {supported}"
    head = read_bytes(path, _HEAD)
    if not head.strip():
        return f"{path}: empty; {supported}"
    looks = next((looks for pattern, looks in _STRANGERS if pattern.match(head)), None)
    if looks is None:
        looks = f"an unknown format, beginning with {head[:24]!r}"
    return f"{path}: looks like {looks}; {supported}"
