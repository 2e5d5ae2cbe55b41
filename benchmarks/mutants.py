"""Which faults the tests notice: changes one place of the engine at a time and runs tests near it.

    python -m benchmarks.mutants sample --count 160 --seed 0 --out mutants.jsonl
    python -m benchmarks.mutants run mutants.jsonl --tree COPY --out killed.jsonl
    python -m benchmarks.mutants whole mutants.jsonl --tree COPY --out killed.jsonl -- COMMAND
    python -m benchmarks.mutants compare killed-of-one-suite.jsonl killed-of-another.jsonl

A mutant (`benchmarks/mutations.py`) is killed if a test fails, or runs out of time. `run` changes
the files of COPY, a copy of the repository of its own, and takes its tests from there. Tests near a
module are those that import it, shortest first, then those of its room, then those of its room that
train on ranks. Each mutant is tested in a fork of a process that has imported torch and
megatron-core. `--hints` takes what `run` wrote of another suite: the test that killed a mutant
there is tried first.

`whole` gives the mutants that are left to the whole suite, all of them in one run: COMMAND, to
which `--junitxml` is added. Of each test that fails the mutants are halved until one is found that
makes it fail alone; the suite runs again without those that were found, until nothing fails.
`sample --same-as COPY` draws from files that another version of the repository has, too, so that
the suites of both can be compared.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.mutations import ROOMS, Mutant, applied, sample

ROOT = Path(__file__).parents[1]
# Of each room: what trains or converts with it on ranks, the widest first.
ON_RANKS = {
    "moe": (
        "parallel/test_layer_layouts.py",
        "parallel/test_matrix.py",
        "parallel/test_padding.py",
    ),
    "training": (
        "parallel/test_numerical_guard.py",
        "parallel/test_checkpoint_load.py",
        "parallel/test_routing_guard.py",
        "parallel/test_telemetry.py",
        "parallel/test_checkpoint_resume.py",
    ),
    "config": ("parallel/test_matrix.py",),
    "workbench/planning": ("parallel/test_rank_memory.py",),
    "interop": ("interop",),
}


def stages(tree: Path, mutant: Mutant) -> Iterator[list[str]]:
    """Tests, nearest first: those that import the module, all of the room, those on ranks."""
    room = next(room for room in ROOMS if mutant.path.startswith(room + "/"))
    module = ".".join(["moepp_megatron", *Path(mutant.path).with_suffix("").parts])
    name = Path(mutant.path).stem
    near = [
        path
        for path in (tree / "tests" / "unit").rglob("test_*.py")
        if f"test_{name}" in path.name or _imports(path, module)
    ]
    first = sorted((str(path.relative_to(tree)) for path in near), key=_seconds)
    first.sort(key=lambda path: f"test_{name}" not in path)
    first = [path for path in first if _seconds(path) < 60]
    yield first
    folder = tree / "tests" / "unit" / room
    rest = [str(path.relative_to(tree)) for path in sorted(folder.rglob("test_*.py"))]
    yield [path for path in sorted(rest, key=_seconds) if path not in first and _seconds(path) < 60]
    yield [f"tests/{each}" for each in ON_RANKS[room]]


def _seconds(test: str) -> float:
    """What the file of a test takes."""
    return float(_durations().get(test.partition("::")[0], 1.0))


@cache
def _durations() -> dict[str, float]:
    path = ROOT / "tests" / "durations.json"
    return json.loads(path.read_text(encoding="ascii"))  # type: ignore[no-any-return]


def _imports(path: Path, module: str) -> bool:
    parent, _, name = module.rpartition(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == module:
                return True
            if node.module == parent and any(alias.name == name for alias in node.names):
                return True
    return False


def killed_by(tree: Path, tests: list[str], limit_s: float) -> str | None:
    """The test that fails in a fork of this process, or None; needs a tree that is changed."""
    if not tests:
        return None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        _be_pytest(tree, tests, writer)
    os.close(writer)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            with os.fdopen(reader) as pipe:
                failed = pipe.read().strip()
            if failed or os.waitstatus_to_exitcode(status) == 0:
                return failed or None
            return "pytest itself"
        time.sleep(0.05)
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "out of time"


def _be_pytest(tree: Path, tests: list[str], writer: int) -> None:
    import pytest

    class FirstFailure:
        @staticmethod
        def pytest_runtest_logreport(report: pytest.TestReport) -> None:
            if report.failed:
                os.write(writer, f"{report.nodeid}\n".encode())

        @staticmethod
        def pytest_collectreport(report: pytest.CollectReport) -> None:
            if report.failed:
                os.write(writer, f"{report.nodeid} (import)\n".encode())

    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(each for each in sys.path if each not in ("", str(ROOT)))]
    os.environ["PYTHONPATH"] = str(tree)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in [name for name in sys.modules if name.split(".")[0] in _OURS]:
        del sys.modules[name]
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not matrix and not slow",
        "-W",
        "ignore",
    ]
    status = pytest.main([*options, *tests], plugins=[FirstFailure()])
    # Nothing collected is no failure.
    os._exit(0 if status in (0, 5) else int(status))


_OURS = ("moepp_megatron", "tests", "benchmarks")


def run(
    sampled: list[Mutant], tree: Path, out: Path, limit_s: float, hints: dict[object, object]
) -> None:
    """Test each mutant that `out` does not have yet; one line each.

    Args:
        sampled: The mutants.
        tree: Where the files are changed and the tests run.
        out: Gets a line of JSON a mutant.
        limit_s: Seconds for the tests of a stage, of which more kill.
        hints: By number of the mutant, the test to try first.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _import_once()
    done = {line["number"] for line in _lines(out)} if out.exists() else set()
    for number, mutant in enumerate(sampled, 1):
        if number in done:
            continue
        begin, killer, stage = time.monotonic(), None, 0
        first = [str(test) for test in [hints.get(number)] if _is_there(tree, test)]
        # Read before the file is changed: which tests import it.
        in_turn = [first, *stages(tree, mutant)]
        with applied(tree, [mutant]):
            for stage, tests in enumerate(in_turn):  # noqa: B007
                killer = killed_by(tree, tests, limit_s)
                if killer is not None:
                    break
        took = round(time.monotonic() - begin, 1)
        line = {"number": number, **asdict(mutant), "killed_by": killer, "stage": stage, "s": took}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number}/{len(sampled)} {mutant.path}:{mutant.line} {mutant.kind}: {killer}")


def run_whole(
    sampled: list[Mutant], tree: Path, out: Path, limit_s: float, command: Sequence[str]
) -> None:
    """Find which of the mutants that `out` has as not killed the whole suite kills.

    Args:
        sampled: The mutants.
        tree: Where the files are changed and the tests run.
        out: What `run` wrote; lines of mutants that are killed get their test.
        limit_s: Seconds for one test.
        command: Runs the suite, in `tree`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _import_once()
    lines = {int(str(line["number"])): line for line in _lines(out)}
    left = [number for number, line in lines.items() if line["killed_by"] is None]
    report = out.with_suffix(".xml")
    ignored = _failing(tree, command, report)
    print(f"{len(left)} left; {len(ignored)} tests fail without them: {ignored}")
    asked: list[str] = []
    while left:
        with applied(tree, [sampled[number - 1] for number in left]):
            found = _failing(tree, [*command, *asked], report)
        failing = [test for test in found if test not in ignored]
        print(f"{len(left)} mutants at once: {len(failing)} tests fail", flush=True)
        if not failing and not asked:
            break
        # Without those that are found, what has failed is tried again, and then the whole suite.
        asked = failing
        number_before = len(left)
        for test in sorted(failing, key=_seconds):
            while (number := _culprit(sampled, left, tree, test, limit_s)) is not None:
                print(f"{number} {sampled[number - 1]}: {test}", flush=True)
                lines[number] |= {"killed_by": test, "stage": "whole"}
                left.remove(number)
                texts = (json.dumps(lines[number]) for number in sorted(lines))
                out.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        if len(left) == number_before:
            print(f"fail with all of them and with none alone: {failing}", flush=True)
            ignored += failing


def _failing(tree: Path, command: Sequence[str], report: Path) -> list[str]:
    """Names of the tests that fail."""
    report.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=tree, env=environment, stdout=subprocess.DEVNULL
    )
    names = [
        _name(case)
        for case in ElementTree.parse(report).iter("testcase")
        if any(case.find(kind) is not None for kind in ("failure", "error"))
    ]
    # 2: files that cannot be imported, which are named, too.
    if done.returncode not in (0, 1) and not (done.returncode == 2 and names):
        sys.exit(f"error: {' '.join(command)} ended with status {done.returncode}")
    return names


def _name(case: ElementTree.Element) -> str:
    """What pytest calls a test, or a file that cannot be imported."""
    inside, name = case.get("classname", ""), case.get("name", "")
    return f"{inside.replace('.', '/')}.py::{name}" if inside else f"{name.replace('.', '/')}.py"


def _culprit(
    sampled: list[Mutant], left: Sequence[int], tree: Path, test: str, limit_s: float
) -> int | None:
    """One of the mutants that lets the test fail, found by halves.

    None if it passes with all of them, or fails without any when it runs alone.
    """

    def fails(numbers: Sequence[int]) -> bool:
        with applied(tree, [sampled[number - 1] for number in numbers]):
            return killed_by(tree, [test], limit_s) is not None

    suspects = list(left)
    if not suspects or not fails(suspects) or fails([]):
        return None
    while len(suspects) > 1:
        half = suspects[: len(suspects) // 2]
        suspects = half if fails(half) else suspects[len(half) :]
    return suspects[0] if fails(suspects) else None


def _is_there(tree: Path, test: object) -> bool:
    """Whether a hint is the name of a test that the tree has."""
    file, found, name = str(test).partition("::")
    function = name.split("[")[0]
    path = tree / file
    return bool(found) and path.is_file() and f"def {function}(" in path.read_text("utf-8")


def _import_once() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
    import megatron.core.distributed
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import pydantic
    import pytest
    import rich.console
    import typer

    del os.environ["TRITON_INTERPRET"]
    del megatron, pydantic, pytest, rich, typer


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare(first: Path, second: Path) -> str:
    """Mutants of each room killed by either suite, and those that only one of them kills."""
    kills = [{line["number"]: line for line in _lines(path)} for path in (first, second)]
    both = sorted(kills[0].keys() & kills[1].keys(), key=int)
    of_room: list[Counter[str]] = [Counter(), Counter(), Counter()]
    only = []
    for number in both:
        lines = [kill[number] for kill in kills]
        room = next(room for room in ROOMS if str(lines[0]["path"]).startswith(room + "/"))
        of_room[2][room] += 1
        for count, line in zip(of_room, lines, strict=False):
            count[room] += line["killed_by"] is not None
        if (lines[0]["killed_by"] is None) != (lines[1]["killed_by"] is None):
            only.append(f"{lines[0]['path']}:{lines[0]['line']} {lines[0]['kind']}: {lines}")
    rows = [
        f"{room:20} {of_room[2][room]:4} {of_room[0][room]:4} {of_room[1][room]:4}"
        for room in ROOMS
    ]
    total = [sum(count.values()) for count in of_room]
    rows.append(f"{'all':20} {total[2]:4} {total[0]:4} {total[1]:4}")
    return "\n".join([f"{'room':20} mutants, killed by the first, by the second", *rows, *only])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("sample")
    drawing.add_argument("--count", type=int, default=160)
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--same-as", type=Path)
    drawing.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("mutants", type=Path)
    running.add_argument("--tree", type=Path, required=True)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--limit-s", type=float, default=300.0)
    running.add_argument("--hints", type=Path)
    whole = commands.add_parser("whole")
    whole.add_argument("mutants", type=Path)
    whole.add_argument("--tree", type=Path, required=True)
    whole.add_argument("--out", type=Path, required=True)
    whole.add_argument("--limit-s", type=float, default=300.0)
    whole.add_argument("suite", nargs="+", metavar="COMMAND")
    comparing = commands.add_parser("compare")
    comparing.add_argument("killed", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.command == "sample":
        other = arguments.same_as and arguments.same_as / "moepp_megatron"
        drawn = sample(ROOT / "moepp_megatron", arguments.count, arguments.seed, other)
        arguments.out.write_text("".join(json.dumps(asdict(each)) + "\n" for each in drawn))
    elif arguments.command == "run":
        read = [Mutant(**line) for line in _lines(arguments.mutants)]  # type: ignore[arg-type]
        lines = _lines(arguments.hints) if arguments.hints else []
        hints = {line["number"]: line["killed_by"] for line in lines}
        run(read, arguments.tree.resolve(), arguments.out, arguments.limit_s, hints)
    elif arguments.command == "whole":
        read = [Mutant(**line) for line in _lines(arguments.mutants)]  # type: ignore[arg-type]
        run_whole(read, arguments.tree.resolve(), arguments.out, arguments.limit_s, arguments.suite)
    else:
        print(compare(*arguments.killed))


if __name__ == "__main__":
    main()
