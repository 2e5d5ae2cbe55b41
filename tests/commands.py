"""`moepp` commands in processes of their own, most of them without the imports.

torch and megatron-core take four seconds of computing to import, more than most commands do. So
`moepp` forks from the server that test ranks are forked from (tests/parallel/ranks.py), which has
imported them. `cold` is what a user's shell starts, for tests of a start itself: what is imported
when, what is printed at an import.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.parallel.ranks import fork_server

MODULE = "moepp_megatron.cli.main"
TIMEOUT_S = 240.0


def moepp(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command in a fork of the server of ranks; ranks that it starts are real ones."""
    return _forked(["", *map(str, arguments)], os.getcwd())


def program(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """As `moepp`, a Python program, in its own folder."""
    return _forked([str(path), *map(str, arguments)], str(path.parent))


def _forked(words: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as written:
        outputs = [Path(written) / name for name in ("stdout", "stderr")]
        with fork_server() as context:
            process = context.Process(target=_run, args=(words, dict(os.environ), folder, outputs))
            process.start()
        process.join(TIMEOUT_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, TIMEOUT_S, *map(Path.read_text, outputs))
        printed = [path.read_text(errors="replace") for path in outputs]
        return subprocess.CompletedProcess(words, process.exitcode, *printed)


def cold(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command as a shell does."""
    command = [sys.executable, "-m", MODULE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def _run(words: list[str], environment: dict[str, str], folder: str, outputs: list[Path]) -> None:
    """The process: everything that the caller could tell from a start of its own is as there."""
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    if words[0]:
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
