"""Damaged recordings of every format give one line or a profile, never a traceback."""

import copy
import gzip
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError
from moepp_megatron.tools.profiling.analysis import analyse
from moepp_megatron.tools.profiling.document import document
from moepp_megatron.tools.profiling.formats import records
from moepp_megatron.tools.report import profile as report_profile
from tests.refusals import config_error

SAMPLES = Path(__file__).parent / "samples"
WRONG = (
    None,
    "x",
    "",
    -1,
    0,
    1.5,
    True,
    [],
    {},
    [None],
    ["x"],
    [-1, 3],
    {"a": 1},
    [[[1]]],
    float("nan"),
    float("inf"),
    1e300,
    -1e300,
    2**63,
    10**17,
    "9" * 5000,
    "[1, 2",
    "moepp/step/" + "9" * 5000,
    "moepp/step/x",
    "moepp/comm/1/2>3.4/send",
    "moepp/layer1/dispatch",
)
DELETED = object()
# Wrong values for each field; all of them are tried over the fields of a file.
TURN = 2


def event(name, start, duration, cat="cpu_op", **more):
    whole = {"ph": "X", "pid": 1, "tid": 1, "cat": cat, "name": name}
    return whole | {"ts": start, "dur": duration} | more


def scope(*event_of, **more):
    return event(*event_of, "user_annotation", **more)


INPUTS = {
    "Concrete Inputs": ["", "", "", "[3, 2]", "[3, 5]"],
    "Input type": ["float", "float", "", "ScalarList", "ScalarList"],
    "Input Dims": [[5, 4], [8, 4], [], [], []],
}
SENT = {"Input type": ["float"], "Input Dims": [[8, 4]]}
LINK = {"id": 1, "pid": 1, "tid": 1, "cat": "fwdbwd", "name": "fwdbwd"}
GLOO = [
    scope("moepp/step/1", 0.0, 900.0),
    scope("moepp/layer1/dispatch", 10.0, 300.0),
    scope("moepp/comm/23/0/all_to_all", 20.0, 9),
    event("c10d::alltoall_base_", 21.0, 7.0, args=INPUTS),
    scope("gloo:all_to_all", 25.0, 50.0, tid=2, args=SENT),
    scope("moepp/wait", 40.0, 30.0),
    event("aten::mm", 100.0, 50.0, args={"Input Dims": [[2, 2]]}),
    {**LINK, "ph": "s", "ts": 100.0},
    event("autograd::engine::evaluate_function: Mm", 500.0, 90.0),
    event("MmBackward0", 510.0, 50.0),
    {**LINK, "ph": "f", "ts": 510.0},
]


def gloo_trace(rank):
    groups = [{"pg_name": "23", "pg_desc": "EXPERT_MODEL_PARALLEL_GROUP", "ranks": [0, 1]}]
    about = {"backend": "gloo", "rank": rank, "world_size": 2, "pg_config": groups}
    return {"baseTimeNanoseconds": 5, "distributedInfo": about, "traceEvents": GLOO}


def sample(name):
    return json.loads((SAMPLES / name).read_text())


def mutations(value, path=()):
    """Paths of all fields and of the first items of lists."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from mutations(value[key], (*path, key))
    elif isinstance(value, list):
        for place in range(len(value) if len(path) < 2 else min(len(value), 2)):
            yield from mutations(value[place], (*path, place))


def changed(whole, path, wrong):
    if not path:
        return wrong
    result = copy.deepcopy(whole)
    owner = result
    for key in path[:-1]:
        owner = owner[key]
    if wrong is DELETED:
        del owner[path[-1]]
    else:
        owner[path[-1]] = wrong
    return result


@pytest.fixture(autouse=True)
def _no_console(monkeypatch):
    """Tables are built but not drawn, which would take most of the time."""
    nowhere = SimpleNamespace(print=lambda *parts, **options: None)
    monkeypatch.setattr(report_profile, "wide_console", lambda **options: nowhere)


def profile(folder):
    """Everything that the command does."""
    found = analyse(folder)
    numbers = document(found)
    json.dumps(numbers)
    report_profile.print_profile(found, numbers)


def each(good, write, read, turn):
    """Damage every field in a few ways; returns what ended otherwise than in one line."""
    failed = []
    paths = list(mutations(good))
    for number, path in enumerate(paths):
        for k in range(turn):
            wrong = (*WRONG, DELETED)[(number + k * (len(WRONG) // turn + 1)) % (len(WRONG) + 1)]
            if not path and wrong is DELETED:
                continue
            write(changed(good, path, wrong))
            try:
                read()
            except ConfigError as error:
                if "\n" in str(error) or error.exit_code != 2 or len(str(error)) > 600:
                    failed.append((path, str(wrong)[:20], str(error)[:300]))
            except Exception as error:
                failed.append((path, str(wrong)[:20], repr(error)[:300]))
    return failed


@pytest.mark.parametrize("name", ["nccl", "gloo", "meta"])
def test_kineto(tmp_path, name):
    shutil.copytree(SAMPLES / "kineto_nccl", tmp_path, dirs_exist_ok=True)
    target = tmp_path / ("rank0.meta.json" if name == "meta" else "rank0.pt.trace.json")
    if name == "gloo":
        (tmp_path / "rank1.pt.trace.json").write_text(json.dumps(gloo_trace(1)))
        good = gloo_trace(0)
    else:
        good = sample(f"kineto_nccl/{target.name}")
    write = lambda value: target.write_text(json.dumps(value))  # noqa: E731
    write(good)
    profile(tmp_path)
    assert each(good, write, lambda: profile(tmp_path), TURN) == []


KINETO = (SAMPLES / "kineto_nccl/rank0.pt.trace.json").read_bytes()
DEEP = b'{"traceEvents": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BOMB = gzip.compress(b'{"traceEvents": [' + b"[]," * 1_000_000 + b"[]]}")
DAMAGED = {
    "rank0.pt.trace.json": (b"", b"{", b"[]", b"null", KINETO[:-50], KINETO[50:], DEEP, b"\xff"),
    "rank0.pt.trace.json.gz": (gzip.compress(KINETO)[:-9], gzip.compress(KINETO)[:40], BOMB),
}


@pytest.mark.parametrize(
    ("name", "place"), [(name, n) for name, files in DAMAGED.items() for n in range(len(files))]
)
def test_damaged_bytes(tmp_path, monkeypatch, name, place):
    """The command ends with one line and status 2."""
    monkeypatch.setattr(records, "MAX_BYTES", 2_500_000)
    (tmp_path / name).write_bytes(DAMAGED[name][place])
    result = CliRunner().invoke(app, ["profile", str(tmp_path)])
    assert isinstance(result.exception, ConfigError), repr(result.exception)
    assert result.exception.exit_code == 2
    assert len(str(result.exception).splitlines()) == 1
    assert len(str(result.exception)) < 600


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rank0.pt.trace.json")
    with config_error("Not a regular file"):
        analyse(tmp_path)
