"""`moepp bench collectives`: the command on two ranks, formulas, wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moepp_megatron.cli.bench_collectives import _KINDS
from moepp_megatron.cli.main import app
from moepp_megatron.config import ConfigError
from moepp_megatron.config.choices import parse_size
from moepp_megatron.workbench.bench.collective_cases import KINDS
from moepp_megatron.workbench.bench.collectives import default_group_sizes, sizes_between
from moepp_megatron.workbench.profiling.collective import Operation
from moepp_megatron.workbench.profiling.measures.ceiling import Ceiling
from tests.commands import moepp


def test_command_writes_a_ceiling_and_a_plot(tmp_path: Path) -> None:
    command = ["bench", "collectives"]
    command += ["--nproc", "2", "--min", "1K", "--max", "4K", "--repeats", "1"]
    command += ["--operations", "all_to_all,all_reduce,send_receive", "--iterations", "2"]
    command += ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
    done = moepp(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads((tmp_path / "c.json").read_text())
    assert [(r["operation"], r["size_bytes"]) for r in records] == [
        (operation, size)
        for operation in ("all_to_all", "all_reduce", "send")
        for size in (1024, 4096)
    ]
    for r in records:
        assert r["wrong"] == 0
        assert r["backend"] == "gloo"
        assert r["algorithm_gb_s"] == pytest.approx(r["size_bytes"] / r["time_us"] / 1e3)
        # nccl-tests with two ranks: (n - 1) / n = 1/2, 2 (n - 1) / n = 1, 1.
        factor = 0.5 if r["operation"] == "all_to_all" else 1.0
        assert r["bus_gb_s"] == pytest.approx(factor * r["algorithm_gb_s"])
    ceiling = Ceiling.read(tmp_path / "c.json")
    measured = [r["bus_gb_s"] for r in records if r["operation"] == "all_to_all"]
    assert ceiling.peak(Operation.ALL_TO_ALL, 2) == pytest.approx(max(measured))
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "busbw" in done.stdout


def test_command_knows_every_kind() -> None:
    assert tuple(KINDS) == _KINDS


def test_sizes_and_groups() -> None:
    assert parse_size("--min", "1K") == 1024
    assert parse_size("--min", "3m") == 3 * 2**20
    assert sizes_between(1024, 70000, 4) == [1024, 4096, 16384, 65536]
    assert default_group_sizes(8) == [2, 4, 8]
    assert default_group_sizes(6) == [2, 6]
    assert default_group_sizes(3) == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc", "1"], "--nproc (1) must be at least 2"),
        (["--min", "x"], "--min (x) must be bytes above 0"),
        (["--max", "0"], "--max (0) must be bytes above 0"),
        (["--max", "-1K"], "--max (-1K) must be bytes above 0"),
        (["--min", "1M", "--max", "1K"], "--min (1M) must be at most --max (1K)"),
        (["--groups", "3"], "--groups (3) must be at least 2 and divide the number of ranks (2)"),
        (["--groups", "two"], "--groups (two) must be a whole number above 0"),
        (["--operations", "alltoall"], "--operations (alltoall) must be one of all_to_all"),
        (["--dtype", "fp8"], "--dtype (fp8) must be one of fp32, bf16"),
        (["--json", "no/such/folder/c.json"], "must lie in a folder that exists"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "collectives", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
