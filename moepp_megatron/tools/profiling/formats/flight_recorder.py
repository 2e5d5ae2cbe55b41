"""Reads dumps of torch's flight recorder.

Written by torch (c10d/FlightRecorderDetail.hpp, versions 2.x), as JSON or as a pickle; a run of
this package writes both into `hangs/` (training/resilience/hang_report.py). Every collective
that a rank enqueued is there, with sizes and order. How long it took is only there for NCCL with
TORCH_NCCL_ENABLE_TIMING=1; when it ran never is: the watchdog looks every tenth of a second. The
times that are given are those at which the host enqueued the calls.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepp_megatron.config.json_file import MAX_DEPTH, parse_json
from moepp_megatron.tools.profiling.collective import POINT_TO_POINT, Collective
from moepp_megatron.tools.profiling.formats.c10d import bytes_of_type, operation_of
from moepp_megatron.tools.profiling.formats.records import (
    LARGEST,
    field,
    read_bytes,
    whole_list,
)
from moepp_megatron.tools.profiling.trace import ProfileError

_PICKLE = b"\x80"
# Enough for the first record, whatever it holds.
_HEAD = 65536
_SUPPORTED = "supported are folders of torch profiler traces, torch flight-recorder dumps"
# Beginnings of unsupported files, and what to do about them.
_STRANGERS = {
    b"SQLite format 3\x00": "an SQLite database such as Nsight Systems exports",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself",
}
_MAJOR_VERSION = "2"
_RANK = re.compile(r"(\d{1,9})(\.json|\.pkl|\.pickle)?(\.gz)?$")
_PEER = re.compile(r"(?:send|recv) (\d{1,9})(->|<-)(\d{1,9}|\?)")


# Python's own unpickler: the one in C allocates what an index of its memo asks for.
class _DataUnpickler(pickle._Unpickler):
    """Reads plain values only: a dump needs no class, and a class could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"asks for {module}.{name}, which no flight record contains")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("names a persistent object, which no flight record contains")


def holds_flight_records(path: Path) -> bool:
    """True if a file, or one in a folder, is a dump of the flight recorder.

    Raises:
        ProfileError: A file cannot be read.
    """
    files = path.iterdir() if path.is_dir() else [path]
    return any(_is_flight_record(file) for file in files if file.is_file())


def read_flight_records(path: Path) -> dict[int, list[Collective]]:
    """Read one dump, or those of a folder; other files in it are left alone.

    Returns:
        Collectives of each global rank in the order in which they were enqueued.

    Raises:
        ProfileError: No file can be read; says what it looks like and what is supported.
    """
    files = _files(path)
    dumps = _one_a_rank([file for file in files if _is_flight_record(file)])
    if not dumps:
        raise ProfileError(_unknown(path, files))
    by_rank: dict[int, list[Collective]] = defaultdict(list)
    for call in (call for file in dumps for call in _read_flight_record(file)):
        by_rank[call.rank].append(call)
    return dict(sorted(by_rank.items()))


def _is_flight_record(file: Path) -> bool:
    head = read_bytes(file, _HEAD).lstrip()
    if head.startswith(_PICKLE):
        return b"pg_config" in read_bytes(file)
    is_trace = re.search(rb'"(traceEvents|schemaVersion)"\s*:', head)
    keys = rb'"(entries|pg_config|comm_lib_version)"\s*:'
    return head.startswith(b"{") and not is_trace and re.search(keys, head) is not None


def _read_flight_record(path: Path) -> list[Collective]:
    """Reads one rank's dump, whose name ends with the rank (`trace_rank_3`).

    Returns:
        Collectives in the order in which they were enqueued. One without `duration_ms` has a
        duration of 0.

    Raises:
        ProfileError: The file is damaged, lacks a field, or does not name its rank.
    """
    match = _RANK.search(path.name)
    if match is None:
        raise ProfileError(
            f"{path}: the name of a flight record must end with its rank, such as trace_rank_3"
        )
    dump = _load(path)
    version = field(dump, "version", str, str(path))
    if version.partition(".")[0] != _MAJOR_VERSION:
        raise ProfileError(f"{path}: flight record of version {version[:20]}; supported: 2.x")
    groups = {}
    configured = field(dump, "pg_config", dict, str(path))
    for name in configured:
        place = f"{path}, pg_config {str(name)[:40]!r}"
        ranks = field(configured[name], "ranks", str, place)
        groups[name] = tuple(int(rank) for rank in re.findall(r"\d{1,9}", ranks))
    return [
        _collective(entry, int(match[1]), groups, f"{path}, entry {number}")
        for number, entry in enumerate(field(dump, "entries", list, str(path)))
    ]


def _load(path: Path) -> Any:
    """A dump, JSON or pickle, without running anything that a pickle may hold."""
    content = read_bytes(path)
    try:
        if not content.startswith(_PICKLE):
            return parse_json(content)
        dump = _DataUnpickler(io.BytesIO(content)).load()
        _check_plain(dump, 10 * len(content))
        return dump
    except Exception as error:  # whatever damaged bytes make an unpickler do
        raise ProfileError(
            f"{path}: no flight record ({str(error)[:200]}); give a whole dump of torch"
        ) from None


def _check_plain(value: Any, most: int) -> None:
    """Refuse what JSON could not hold; a pickle may contain itself, or the same a million times."""
    level, seen = [value], 0
    for _ in range(MAX_DEPTH):
        if not level:
            return
        seen += len(level)
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += [*one, *one.values()]
            elif isinstance(one, list | tuple):
                below += one
            elif isinstance(one, int) and abs(one) > LARGEST:
                raise ValueError("holds a number of more than 64 bits")
            elif not (one is None or isinstance(one, str | int | float)):
                raise ValueError(f"holds a {type(one).__name__}")
            if seen + len(below) > most:
                raise ValueError("holds more values than bytes")
        level = below
    raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")


def _collective(
    entry: Any, rank: int, groups: dict[str, tuple[int, ...]], place: str
) -> Collective:
    name = field(entry, "profiling_name", str, place).rpartition(":")[2]
    operation = operation_of(name.partition(" ")[0])
    named = entry.get("process_group")
    if not isinstance(named, list | tuple) or len(named) < 2:
        raise ProfileError(f"{place}: field 'process_group' is not a name and a description")
    group, description = str(named[0]), str(named[1])
    ranks = groups.get(group, groups.get("", ()) if description == "default_pg" else ())
    start = field(entry, "time_created_ns", int, place) / 1e3
    took = field(entry, "duration_ms", float, place, 0.0, least=0) * 1e3
    sequence = field(entry, "collective_seq_id", int, place)
    return Collective(
        operation=operation,
        rank=rank,
        group=group,
        description="" if description == "undefined" else description,
        group_ranks=ranks,
        group_size=len(ranks),
        size=_size(entry, place),
        sequence=None if operation in POINT_TO_POINT else sequence,
        start_us=start,
        end_us=start + took,
        pair=_pair(name),
    )


def _size(entry: dict[str, Any], place: str) -> int | None:
    """Bytes of the larger of inputs and outputs; None for an unknown data type or shape."""
    totals = []
    for side in ("input", "output"):
        shapes = [whole_list(shape) for shape in field(entry, f"{side}_sizes", list, place)]
        dtypes = field(entry, f"{side}_dtypes", list, place)
        if not dtypes:
            continue
        # One type for all tensors, or one for each.
        each = dtypes if len(dtypes) == len(shapes) else [dtypes[0]] * len(shapes)
        total = 0
        for shape, dtype in zip(shapes, each, strict=True):
            width = bytes_of_type(str(dtype))
            if width is None or shape is None:
                return None
            total += math.prod(shape) * width
        totals.append(total)
    return max(totals) if totals and max(totals) <= LARGEST else None


def _pair(name: str) -> tuple[int, int] | None:
    """Ranks of the group that a send or receive goes from and to; None where not said."""
    match = _PEER.match(name)
    if match is None or match[3] == "?":
        return None
    own, other = int(match[1]), int(match[3])
    return (own, other) if match[2] == "->" else (other, own)


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
    looks = next((looks for start, looks in _STRANGERS.items() if head.startswith(start)), None)
    return (
        f"{path}: looks like {looks or f'an unknown format, beginning with {head[:24]!r}'}; "
        f"{_SUPPORTED}"
    )
