"""The measured ceiling: interpolation by hand, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moepp_megatron.config import ConfigError
from moepp_megatron.workbench.profiling.collective import Operation
from moepp_megatron.workbench.profiling.measures.ceiling import Ceiling


def record(size: int, time_us: float, **changes: Any) -> dict[str, Any]:
    """As `moepp bench collectives --json` writes it."""
    base = {
        "operation": "all_to_all",
        "even": True,
        "group_size": 4,
        "nodes": 1,
        "size_bytes": size,
        "count": size // 4,
        "dtype": "fp32",
        "backend": "gloo",
        "time_us": time_us,
        "wrong": 0,
    }
    return base | changes


def written(path: Path, records: object) -> Path:
    path.write_text(json.dumps(records))
    return path


def test_bandwidth_between_and_beyond_measured_sizes(tmp_path: Path) -> None:
    records = [record(4000, 10.0), record(1000, 5.0), record(4000, 8.0, dtype="bf16")]
    ceiling = Ceiling.read(written(tmp_path / "c.json", records))

    def bandwidth(size: int) -> float | None:
        return ceiling.bus_bandwidth(Operation.ALL_TO_ALL, 4, size)

    # Factor 3/4. Measured: 1000 B in 5 us, 4000 B in 8 us (the faster of two).
    assert bandwidth(1000) == pytest.approx(0.75 * 1000 / 5 / 1e3)
    assert bandwidth(4000) == pytest.approx(0.75 * 4000 / 8 / 1e3)
    # A third of the way in bytes is a third of the way in time: 6 us.
    assert bandwidth(2000) == pytest.approx(0.75 * 2000 / 6 / 1e3)
    # Below: the latency of the smallest. Above: the bandwidth of the largest.
    assert bandwidth(100) == pytest.approx(0.75 * 100 / 5 / 1e3)
    assert bandwidth(40000) == pytest.approx(0.75 * 4000 / 8 / 1e3)
    assert ceiling.peak(Operation.ALL_TO_ALL, 4) == pytest.approx(0.375)


def test_what_was_not_measured_has_no_ceiling(tmp_path: Path) -> None:
    records = [record(1000, 5.0), record(1000, 2.0, operation="send", group_size=2)]
    records += [record(1000, 9.0, even=False)]
    ceiling = Ceiling.read(written(tmp_path / "c.json", records))
    assert ceiling.peak(Operation.ALL_REDUCE, 4) is None
    assert ceiling.bus_bandwidth(Operation.ALL_TO_ALL, 2, 1000) is None
    assert ceiling.bus_bandwidth(Operation.ALL_TO_ALL, 4, 0) is None
    # Sending and receiving are one measurement, and factor 1.
    assert ceiling.peak(Operation.RECEIVE, 2) == ceiling.peak(Operation.SEND, 2) == 0.5
    assert ceiling.group_sizes(Operation.ALL_TO_ALL) == [4]
    # The uneven all-to-all is measured apart.
    uneven = ceiling.bus_bandwidth(Operation.ALL_TO_ALL, 4, 1000, even=False)
    assert uneven == pytest.approx(0.75 * 1000 / 9 / 1e3)
    assert ceiling.peak(Operation.ALL_TO_ALL, 4) == pytest.approx(0.75 * 1000 / 5 / 1e3)


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
        Ceiling.read(path)
    assert "\n" not in str(caught.value)
    assert "moepp bench collectives --json" in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a readable file"):
        Ceiling.read(tmp_path / "no such file")
