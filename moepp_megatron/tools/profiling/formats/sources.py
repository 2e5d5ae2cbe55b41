"""Recognises recordings that hold collectives only, and reads them rank by rank."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

from moepp_megatron.tools.profiling.collective import Collective
from moepp_megatron.tools.profiling.formats.flight_recorder import PICKLE, read_flight_record
from moepp_megatron.tools.profiling.formats.inspector import read_inspector
from moepp_megatron.tools.profiling.formats.records import read_bytes
from moepp_megatron.tools.profiling.trace import ProfileError

# Enough for the first record of each format, whatever it holds.
_HEAD = 65536


class Format(StrEnum):
    """A format of collectives, by the name that messages give it."""

    INSPECTOR = "NCCL Inspector logs"
    FLIGHT_RECORDER = "torch flight-recorder dumps"


_SUPPORTED = "supported are folders of torch profiler traces, " + ", ".join(Format)
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
        ProfileError: The file cannot be read.
    """
    head = read_bytes(path, _HEAD).lstrip()
    if head.startswith(b"{") and re.search(rb'"(coll|p2p)_perf"\s*:|^{\s*"header"\s*:', head):
        return Format.INSPECTOR
    is_trace = re.search(rb'"(traceEvents|schemaVersion)"\s*:', head)
    keys = rb'"(entries|pg_config|comm_lib_version)"\s*:'
    if head.startswith(b"{") and not is_trace and re.search(keys, head):
        return Format.FLIGHT_RECORDER
    if head.startswith(PICKLE) and b"pg_config" in read_bytes(path):
        return Format.FLIGHT_RECORDER
    return None


def holds_recording(path: Path) -> bool:
    """True if a file, or one in a folder, is of a format of collectives."""
    files = path.iterdir() if path.is_dir() else [path]
    return any(recognise(file) is not None for file in files if file.is_file())


def read_recording(path: Path) -> dict[int, list[Collective]]:
    """Reads a file, or all files of a folder that have a known format.

    Args:
        path: A file, or a folder with the files of all ranks in one format; others in it are left
            alone.

    Returns:
        Collectives of each global rank in the order of their start, by the rank's own clock
        (`merge.find_clocks` compares them).

    Raises:
        ProfileError: Nothing can be read; says what it looks like and what is supported.
    """
    files = _files(path)
    by_format: dict[Format, list[Path]] = defaultdict(list)
    for file in files:
        if (recording := recognise(file)) is not None:
            by_format[recording].append(file)
    if len(by_format) > 1:
        several = "; ".join(f"{name}: {files[0].name}" for name, files in by_format.items())
        raise ProfileError(f"{path}: holds several formats ({several}); give one of them")
    if not by_format:
        raise ProfileError(_unknown(path, files))
    if Format.INSPECTOR in by_format:
        collectives = read_inspector(by_format[Format.INSPECTOR])
    else:
        dumps = _one_a_rank(by_format[Format.FLIGHT_RECORDER])
        collectives = [call for file in dumps for call in read_flight_record(file)]
    by_rank: dict[int, list[Collective]] = defaultdict(list)
    for call in sorted(collectives, key=lambda call: (call.rank, call.start_us)):
        by_rank[call.rank].append(call)
    return dict(by_rank)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if not path.exists():
        raise ProfileError(f"{path}: no such file or folder; give a run or a recording")
    return [path]


def _one_a_rank(files: Sequence[Path]) -> list[Path]:
    """Leave out the pickles of ranks that have JSON too, since a hang writes both."""
    named = {file: re.search(r"(\d+)\D*$", file.name) for file in files}
    ranks = {file: name[1] for file, name in named.items() if name is not None}
    as_json = {ranks.get(file) for file in files if ".json" in file.suffixes}
    return [file for file in files if ".json" in file.suffixes or ranks.get(file) not in as_json]


def _unknown(path: Path, files: Sequence[Path]) -> str:
    if path.is_dir():
        names = ", ".join(file.name for file in files[:3]) or "nothing"
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        return f"{path}: a folder without a known profile (holds {names}{more}); {_SUPPORTED}"
    head = read_bytes(path, _HEAD)
    if not head.strip():
        return f"{path}: empty; {_SUPPORTED}"
    looks = next((looks for pattern, looks in _STRANGERS if pattern.match(head)), None)
    return (
        f"{path}: looks like {looks or f'an unknown format, beginning with {head[:24]!r}'}; "
        f"{_SUPPORTED}"
    )
