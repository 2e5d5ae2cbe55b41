"""Bandwidth of links: NVLink and network by a measurement, and the ceiling of a profile."""

import json
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.bench.links import link_rates, main
from moepp_megatron.workbench.profiling.collective import Collective, Operation
from moepp_megatron.workbench.profiling.measures.links import read_ceiling


def record(size: int, time_us: float, **changes: Any) -> dict[str, Any]:
    base = {"operation": "all_to_all", "group_size": 4, "nodes": 1, "size_bytes": size}
    return base | {"time_us": time_us} | changes


def written(folder: Path, records: object) -> Path:
    path = folder / "links.json"
    path.write_text(json.dumps(records))
    return path


def call(size: int | None, operation: Operation = Operation.ALL_TO_ALL, ranks: int = 4) -> Any:
    return Collective(operation=operation, rank=0, group_size=ranks, size=size)


def test_links_by_all_to_alls() -> None:
    records = [record(8000, 2.0), record(8000, 4.0), record(8000, 1.0, operation="all_reduce")]
    # 3/4 of what a rank sends leaves it, and 4/8 the node where two have four ranks each.
    records += [record(8000, 8.0, group_size=8, nodes=2)]
    assert link_rates(records, per_node=4) == {"nvlink": 3.0, "network": 0.5}


def test_bandwidth_between_and_beyond_measured_sizes(tmp_path: Path) -> None:
    records = [record(4000, 10.0), record(1000, 5.0), record(4000, 8.0)]
    peak = read_ceiling(written(tmp_path, records))
    # Factor 3/4. Measured: 1000 B in 5 us, 4000 B in 8 us (the faster of two).
    assert peak(call(1000)) == pytest.approx(0.75 * 1000 / 5 / 1e3)
    assert peak(call(4000)) == pytest.approx(0.75 * 4000 / 8 / 1e3)
    # A third of the way in bytes is a third of the way in time: 6 us.
    assert peak(call(2000)) == pytest.approx(0.75 * 2000 / 6 / 1e3)
    # Below: the latency of the smallest. Above: the bandwidth of the largest.
    assert peak(call(100)) == pytest.approx(0.75 * 100 / 5 / 1e3)
    assert peak(call(40000)) == pytest.approx(0.75 * 4000 / 8 / 1e3)


def test_what_was_not_measured_has_no_ceiling(tmp_path: Path) -> None:
    records = [record(1000, 5.0), record(1000, 2.0, operation="send", group_size=2)]
    peak = read_ceiling(written(tmp_path, records))
    assert peak(call(1000, Operation.ALL_REDUCE)) is None
    assert peak(call(1000, ranks=2)) is None
    assert peak(call(None)) is None
    # Sending and receiving are one measurement, and factor 1.
    assert peak(call(1000, Operation.RECEIVE, 2)) == peak(call(1000, Operation.SEND, 2)) == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON"),
        ('{"a": 1}', "must hold measured collectives"),
        ('[{"operation": "all_to_all"}]', "0.group_size does not fit"),
        (json.dumps([record(1000, 0.0)]), "0.time_us does not fit"),
        (json.dumps([record(1000, 1.0, operation="teleport")]), "0.operation does not fit"),
        (json.dumps([record(1000, float("nan"))]), "0.time_us does not fit"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_ceiling(path)
    assert "\n" not in str(caught.value)
    assert "workbench.bench.links FILE" in str(caught.value)
    with pytest.raises(ConfigError, match="must be a readable file"):
        read_ceiling(tmp_path / "no such file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["f.json"], "at least 2 ranks"), (["f.json", "--max", "x"], r"--max \(x\)")],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(arguments)
