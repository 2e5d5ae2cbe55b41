"""Packages of other projects whose own Python is played: fetched through pip, kept in build/real.

Nothing of them is in the repository. Without a network what needs them is skipped, with the reason.
"""

import fcntl
import functools
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CACHE = ROOT / "build/real"


@functools.cache
def pinned(package):
    """The version in constraints.txt."""
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None, f"constraints.txt names {package}"
    return found[1]


@dataclass(frozen=True)
class Engine:
    """Transformer Engine: `python` has its package, `source` the C++ of its part for torch."""

    python: Path
    source: Path


class Unavailable(Exception):
    """A package cannot be fetched; the text says why."""


@functools.cache
def transformer_engine(version):
    """Transformer Engine's Python and the C++ source of its extension, of one version.

    Raises:
        Unavailable: pip cannot fetch them.
    """
    folder = _CACHE / f"transformer_engine-{version}"
    names = f"transformer_engine=={version}", f"transformer_engine_torch=={version}"

    def fetch(target):
        _pip("install", "--target", str(target / "python"), names[0])
        # Its metadata are made with the torch that is here.
        _pip("download", "--no-build-isolation", "--no-binary=:all:", "-d", str(target), names[1])
        (archive,) = target.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(target / "source", filter="data")

    _once(folder, fetch)
    (source,) = (folder / "source").iterdir()
    return Engine(folder / "python", source)


def cuda_headers(cuda):
    """Folder of packages with the headers that those of torch's wheels include, and wheels lack.

    Raises:
        Unavailable: pip cannot fetch them.
    """
    folder = _CACHE / f"cuda_headers-{cuda}"
    _once(
        folder,
        lambda target: _pip("install", "--target", str(target), f"nvidia-cuda-crt=={cuda}.*"),
    )
    return folder


def pinned_engine():
    """The version in constraints.txt."""
    return transformer_engine(pinned("transformer_engine"))


def _once(folder, fetch):
    """Fill a folder, by one of the processes that want it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        fetch(unfinished)
        unfinished.rename(folder)


def _pip(*arguments):
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries=0", "--timeout=15"]
    command = [sys.executable, "-m", "pip", arguments[0], *quiet, "--no-deps", *arguments[1:]]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unavailable(f"pip could not fetch {arguments[-1]}: {lines[-1] if lines else ''}")
