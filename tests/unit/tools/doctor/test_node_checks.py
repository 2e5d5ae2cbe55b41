"""Limits, folders, network, packages and speeds: numbers in, findings out."""

import tomllib
from pathlib import Path

import pytest
import torch

from moepp_megatron.config import load_config
from moepp_megatron.config.hardware import Hardware, Thresholds, load_hardware
from moepp_megatron.moe.upstream_versions import BEYOND, OLDEST, TESTED_VERSION
from moepp_megatron.runtime.backends import Backend
from moepp_megatron.tools.doctor import folders, packages, speed, system
from moepp_megatron.tools.doctor.finding import Finding, Judge, Severity, error, warning, worst
from moepp_megatron.tools.doctor.folders import PROBE_BYTES, _ProbedFolder
from moepp_megatron.tools.doctor.speed import CollectiveSpeed, DeviceSpeed, _expected_seconds
from moepp_megatron.tools.doctor.system import _Limits, _NetworkPort
from tests import ROOT

GIB, MIB = 2**30, 2**20
THRESHOLDS = Thresholds()
OK, NOTE, WARNING, ERROR = Severity.OK, Severity.NOTE, Severity.WARNING, Severity.ERROR


@pytest.mark.parametrize(
    ("size", "has_gpu", "severity"),
    [(8 * GIB, True, OK), (64 * MIB, True, ERROR), (64 * MIB, False, WARNING), (None, True, ERROR)],
)
def test_shared_memory(size, has_gpu, severity):
    assert system._check_shared_memory(size, THRESHOLDS, has_gpu).severity == severity


@pytest.mark.parametrize(
    ("limits", "rdma", "severities"),
    [
        (_Limits(None, None, None), True, [OK, OK]),
        (_Limits(65536, 65536, 64 * 1024), False, [OK]),
        (_Limits(65536, 65536, 64 * 1024), True, [OK, ERROR]),
        (_Limits(1024, 524288, None), False, [WARNING]),
    ],
)
def test_limits(limits, rdma, severities):
    found = system._check_limits(limits, THRESHOLDS, rdma)
    assert [finding.severity for finding in found] == severities


def test_who_can_raise_the_limit_of_open_files():
    (own,) = system._check_limits(_Limits(1024, 524288, None), THRESHOLDS, has_rdma=False)
    (admin,) = system._check_limits(_Limits(1024, 1024, None), THRESHOLDS, has_rdma=False)
    assert own.remedy == "ulimit -n 4096"
    assert "slurmd" in admin.remedy


def _port(root, name, state, rate, layer="InfiniBand"):
    folder = root / name / "ports/1"
    folder.mkdir(parents=True)
    for file, text in (("state", state), ("rate", rate), ("link_layer", layer)):
        (folder / file).write_text(text + "\n")


def test_ports_are_read_from_sysfs(tmp_path):
    _port(tmp_path, "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    _port(tmp_path, "mlx5_1", "1: DOWN", "2.5 Gb/sec (1X SDR)")
    _port(tmp_path, "mlx5_2", "1: DOWN", "10 Gb/sec (1X)", "Ethernet")
    ports = system._read_ports(tmp_path)
    assert ports[0] == _NetworkPort("mlx5_0/1", "ACTIVE", 400.0, "InfiniBand")
    (down,) = system._check_ports(ports, num_cards=1, rate_per_gpu=400.0)
    assert (down.severity, down.found) == (WARNING, "mlx5_1/1 is DOWN")
    slow = system._check_ports(ports[:1], num_cards=8, rate_per_gpu=400.0)
    assert [(f.check, f.severity) for f in slow] == [("network rate", NOTE)]
    (fine,) = system._check_ports(ports[:1], num_cards=1, rate_per_gpu=400.0)
    assert fine.severity == OK
    assert system._read_ports(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("sent_back", "problem"),
    [(0.0, None), (1.0, "changed"), (RuntimeError("late\nx"), "late")],
)
def test_a_dispatch_comes_back(monkeypatch, sent_back, problem):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def combine(received, group, handle):
        if isinstance(sent_back, Exception):
            raise sent_back
        return received + sent_back, None

    dispatch = lambda x, *_: (x, None, None, None, 7)  # noqa: E731
    finding = speed.check_dispatch(dispatch, combine, torch.device("cpu"))
    assert finding.severity == (OK if problem is None else ERROR)
    assert problem is None or finding.found.endswith(problem)


@pytest.mark.parametrize(
    ("folder", "needed", "severity", "found"),
    [
        (_ProbedFolder("run", Path("/r"), 100 * GIB, 2e9), 0, OK, "writes 2000 MB/s"),
        (_ProbedFolder("run", Path("/r"), 100 * GIB, 2e6), 0, WARNING, "writes 2 MB/s"),
        (_ProbedFolder("run", Path("/r"), 100 * GIB, None), 0, OK, "100.0 GiB free"),
        (_ProbedFolder("run", Path("/r"), GIB, 2e9), 2 * GIB, ERROR, "1.0 GiB free"),
        (_ProbedFolder("run", Path("/r"), PROBE_BYTES, None), 0, ERROR, "0.1 GiB free"),
        (_ProbedFolder("run", Path("/r"), None, None, "Permission denied"), 0, ERROR, "denied"),
    ],
)
def test_folder(folder, needed, severity, found):
    finding = folders._check_folder(folder, THRESHOLDS, needed)
    assert finding.severity == severity
    assert found in finding.found


def test_a_folder_is_probed_where_it_would_be_made_and_left_clean(tmp_path):
    found = folders._probe_folder("run", tmp_path / "a/b", probe_bytes=2 * MIB)
    assert found.error is None
    assert found.write_rate is not None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = folders._probe_folder("run", tmp_path / "file/run", probe_bytes=MIB)
    assert found.error == "Not a directory"


def test_a_checkpoint_must_fit():
    config = load_config(ROOT / "configs/quickstart.yaml", ["checkpoint.save_interval=10"])
    _, needed = folders._config_folders(config)["checkpoint"]
    assert needed == folders.checkpoint_bytes(config) > 0
    never = load_config(ROOT / "configs/quickstart.yaml", ["checkpoint.save_interval=0"])
    assert set(folders._config_folders(never)) == {"run"}


def test_the_pinned_megatron_is_the_one_asked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"megatron-core>={OLDEST},<{BEYOND}" in project["dependencies"]
    assert packages._check_megatron(TESTED_VERSION).severity == OK
    assert packages._check_megatron("0.20.0").severity == NOTE
    assert packages._check_megatron("0.19.1").severity == ERROR
    assert packages._check_megatron("0.21.0").severity == ERROR
    assert packages._check_megatron(None).found == "not installed"


def test_an_optional_package_says_what_is_used_instead():
    used = Backend("apex", "0.1", True, "fused Adam", "torch's Adam", "build it")
    missing = Backend("apex", None, False, "fused Adam", "torch's Adam", "build it")
    assert packages._check_backend(used).severity == OK
    finding = packages._check_backend(missing)
    assert finding.severity == NOTE
    assert finding.found == "not installed; instead torch's Adam"
    assert finding.remedy == "build it"
    assert missing.line() == "apex: not installed; instead torch's Adam"
    assert used.line() == "apex 0.1: fused Adam"


def test_what_training_would_refuse_is_an_error_here(monkeypatch):
    config = load_config(ROOT / "configs/quickstart.yaml")
    assert packages._check_config(config).severity == OK
    graphs = load_config(ROOT / "configs/quickstart.yaml", ["training.cuda_graphs=[attn]"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    finding = packages._check_config(graphs)
    assert (finding.severity, finding.remedy) == (ERROR, "use []")
    assert finding.rule.startswith("training.cuda_graphs (['attn']) must be empty without a GPU")


def test_a_slow_card_is_named():
    judge = Judge(load_hardware("h100_sxm"), preflight=True)
    speeds = [DeviceSpeed(f"GPU {i}", 720.0, "node1") for i in range(8)]
    (fine,) = speed.check_matmul(speeds, judge)
    assert fine.severity == OK
    assert speed.check_slowest(speeds, judge).severity == OK
    speeds[5] = DeviceSpeed("GPU 5", 500.0, "node2")
    (slow,) = speed.check_matmul(speeds, judge)
    assert (slow.severity, slow.found) == (ERROR, "GPU 5: 500 TFLOP/s in bf16")
    slowest = speed.check_slowest(speeds, judge)
    assert (slowest.severity, slowest.found) == (
        WARNING,
        "GPU 5 of node2: 1.44 times the median time",
    )
    (unrated,) = speed.check_matmul(speeds, Judge(load_hardware("cpu"), preflight=True))
    assert unrated.severity == OK


def test_time_that_rated_links_need():
    one_gib = 2**30
    reduce, exchange = (
        CollectiveSpeed("all-reduce", one_gib, 1.0),
        CollectiveSpeed("all-to-all", one_gib, 1),
    )
    link, network = 450e9, 50e9
    # One node of 8: 2 * 7/8 of the buffer, and 7 parts of 8.
    assert _expected_seconds(reduce, 8, 8, link, None) == pytest.approx(1.75 * one_gib / link)
    assert _expected_seconds(exchange, 8, 8, link, None) == pytest.approx(one_gib * 7 / 8 / link)
    # Two nodes: 8 ports of 50 GB/s are less than NVLink; half of an all-to-all crosses.
    assert _expected_seconds(reduce, 16, 8, link, network) == pytest.approx(
        2 * 15 / 16 * one_gib / 400e9
    )
    assert _expected_seconds(exchange, 16, 8, link, network) == pytest.approx(one_gib / 2 / network)
    assert _expected_seconds(reduce, 16, 8, link, None) is None
    assert _expected_seconds(reduce, 2, 2, None, None) is None


def test_collectives_against_rated_links():
    reduced = CollectiveSpeed("all-reduce", GIB, 0.010)

    def check(expected):
        rated = expected and 2 * 1.75 * GIB / 1e9 / expected
        judge = Judge(Hardware(name="x", nvlink_gb_s=rated), preflight=True)
        return speed.check_collective(reduced, 8, 8, judge)

    assert check(None).severity == OK
    assert check(0.006).severity == OK
    slow = check(0.002)
    assert slow.severity == ERROR
    assert "20% of the rated links" in slow.found


def test_worst_and_line():
    fine = Finding("a", "x")
    bad = error("b", "y", "must be z", "do it", node="n1")
    assert worst([]) == worst([fine]) == OK
    assert worst([fine, bad]) == ERROR
    assert bad.line() == "n1: b: y (must be z); do it"
    with pytest.raises(AssertionError, match="needs a remedy"):
        warning("c", "y", "rule")
