"""`routing_profile.json`: written, read, and refused where it is something else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moepp_megatron.config.errors import ConfigError
from moepp_megatron.config.schema.routing_guard import ShiftSection
from moepp_megatron.file_names import USAGE_FILE
from moepp_megatron.observe.expert_usage import ExpertUsage
from moepp_megatron.observe.shift.noise import UsageNoise
from moepp_megatron.observe.usage_file import StoredUsage


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    noise = UsageNoise(ShiftSection())
    for value in range(50):
        noise.learn(np.array([value / 7, 1.0]), 0.1 * value)
    usage = ExpertUsage(np.array([[3, 5]]), np.zeros((1, 0, 2), dtype=np.int64))
    StoredUsage(usage, "0123", noise).write(tmp_path)
    stored = StoredUsage.read(tmp_path / USAGE_FILE, ShiftSection())
    assert stored.token_classes == "0123"
    assert stored.usage.as_json() == usage.as_json()
    assert stored.noise.as_json() == noise.as_json()


GOOD: dict[str, Any] = {
    "format": "moepp routing profile 2",
    "experts": [[3, 5]],
    "cells": [[[2, 4]]],
    "token_classes": "00",
    "noise": {"differences": [[0.5, 0.25]], "log_distances": [0.5]},
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "other"}, "format"),
        ({"experts": None}, "experts"),
        ({"experts": [[3, -5]]}, "experts"),
        ({"experts": [[3, 5.5]]}, "experts"),
        ({"experts": [[3, 5], [1]]}, "experts"),
        ({"experts": [[10**19, 5]]}, "experts"),
        ({"cells": [[[2, 4]], [[2, 4]]]}, "cells"),
        ({"cells": [[2, 4]]}, "cells"),
        ({"token_classes": "0x"}, "token_classes"),
        ({"noise": {"differences": [[0.5, 0.25, 1.0]], "log_distances": []}}, "noise"),
        ({"noise": {"differences": [[0.5, "a"]], "log_distances": []}}, "noise"),
        ({"noise": {"differences": [], "log_distances": [float("nan")]}}, "noise"),
        ({"noise": {"differences": [], "log_distances": [[1.0]]}}, "noise"),
        ({"noise": {"differences": []}}, "noise"),
        ({"noise": 3}, "noise"),
    ],
)
def test_bad_files_are_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    path.write_text(json.dumps(GOOD))
    StoredUsage.read(path, ShiftSection())
    path.write_text(json.dumps(GOOD | changes))
    with pytest.raises(ConfigError, match=reason) as error:
        StoredUsage.read(path, ShiftSection())
    assert "routing_guard.shift.reference" in str(error.value)
    assert "\n" not in str(error.value)
    without = {name: value for name, value in GOOD.items() if name not in changes}
    path.write_text(json.dumps(without))
    with pytest.raises(ConfigError, match=reason):
        StoredUsage.read(path, ShiftSection())


def test_a_file_of_an_older_version_gives_its_profile(tmp_path: Path) -> None:
    """Its noise is of windows."""
    path = tmp_path / USAGE_FILE
    noise = {"differences": [[0.5, 0.25, 1.0]], "log_distances": [0.5]}
    path.write_text(json.dumps(GOOD | {"format": "moepp routing profile 1", "noise": noise}))
    stored = StoredUsage.read(path, ShiftSection())
    assert stored.usage.experts.tolist() == GOOD["experts"]
    assert stored.noise.as_json() == {"differences": [], "log_distances": []}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_files_that_are_no_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / USAGE_FILE
    path.write_bytes(content)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="routing_guard.shift.reference"):
            StoredUsage.read(name, ShiftSection())
