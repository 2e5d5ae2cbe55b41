"""Checks of the folders that a run writes to: writable, large enough, fast enough."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from moepp_megatron.config import Config, checkpoint_bytes
from moepp_megatron.config.hardware import Thresholds
from moepp_megatron.runtime.disk import free_bytes
from moepp_megatron.tools.doctor.finding import Finding, Severity, error, judged
from moepp_megatron.training.run_folder import RunFolder

# Large enough for a rate, small enough for every preflight.
PROBE_BYTES = 64 * 2**20
_MB = 1e6
_GIB = 2**30


def check_folders(config: Config | None, thresholds: Thresholds) -> list[Finding]:
    """Check the folders of a run, or without one the working folder."""
    wanted = {"current": (Path.cwd(), 0)} if config is None else _config_folders(config)
    return [
        _check_folder(_probe_folder(name, path), thresholds, needed)
        for name, (path, needed) in wanted.items()
    ]


@dataclass(frozen=True)
class _ProbedFolder:
    """A folder, with its purpose as its name, as the probe found it."""

    name: str
    path: Path
    free: int | None  # bytes for this user; None if unknown
    write_rate: float | None  # bytes per second to the disk; None if not measured
    error: str | None = None  # why it cannot be written; None if it can


def _probe_folder(name: str, path: Path, probe_bytes: int = PROBE_BYTES) -> _ProbedFolder:
    """Write and remove a file where the folder is or would be made."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    try:
        free = free_bytes(place)
        if free < 2 * probe_bytes:
            # A probe must not be what fills a disk.
            return _ProbedFolder(name, path, free, None)
        return _ProbedFolder(name, path, free, _write_rate(place, probe_bytes))
    except OSError as error:
        return _ProbedFolder(name, path, None, None, error.strerror or str(error))


def _check_folder(folder: _ProbedFolder, thresholds: Thresholds, needed: int = 0) -> Finding:
    """The finding of one folder, in which `needed` bytes must be free."""
    name, path = f"{folder.name} folder", folder.path
    if folder.error is not None:
        return error(
            name,
            f"{path}: {folder.error}",
            "must be writable",
            "make it writable on this node, or set another run.dir or checkpoint.dir",
        )
    free, needed = folder.free or 0, max(needed, 2 * PROBE_BYTES)
    observation = f"{path}: {free / _GIB:.1f} GiB free"
    if free < needed:
        return error(
            name,
            observation,
            f"must have {needed / _GIB:.1f} GiB",
            "free space, lower checkpoint.keep, or set another checkpoint.dir",
        )
    if folder.write_rate is None:
        return Finding(name, observation)
    return judged(
        folder.write_rate >= thresholds.disk_write_mb_s * _MB,
        name,
        f"{observation}, writes {folder.write_rate / _MB:.0f} MB/s",
        f"should write {thresholds.disk_write_mb_s:g} MB/s",
        "use a faster file system, or checkpoint.async_save=true to hide slow saves",
        Severity.WARNING,
    )


def _config_folders(config: Config) -> dict[str, tuple[Path, int]]:
    """The folders of a run by purpose, with the bytes that must be free in them."""
    folders = {"run": (Path(config.run.dir), 0)}
    # One checkpoint must fit. More may be kept, but a resumed run has some of them already.
    if config.checkpoint.save_interval > 0:
        folders["checkpoint"] = (RunFolder(config).local_checkpoints, checkpoint_bytes(config))
    return folders


def _write_rate(folder: Path, num_bytes: int) -> float:
    """Write rate in bytes per second, to the disk and not to its cache."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moepp-doctor-") as file:
        started = time.perf_counter()
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return num_bytes / (time.perf_counter() - started)
