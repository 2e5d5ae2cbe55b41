"""nvidia-ml-py's own Python over a library with the structures of nvml.h: units, widths, events."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
READ = """
import json
from dataclasses import asdict
from moepp_megatron.runtime.nvml import Nvml

with Nvml() as nvml:
    nvml.watch_faults([0])
    print(json.dumps({
        "driver": asdict(nvml.driver()), "count": nvml.count(), "visible": nvml.visible({}),
        "card": asdict(nvml.card(0)), "none": asdict(nvml.card(1)),
        "sample": nvml.sample(0), "energies": nvml.energies([0]),
        "events": nvml.new_faults(), "later": nvml.new_faults(),
    }))
"""


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("compiling the stub of NVML needs gcc")
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    source = HERE / "nvml_stub.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", READ],
        env=os.environ | {"LD_LIBRARY_PATH": str(folder)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return found


def test_a_card(read):
    assert read["driver"] == {"version": "580.95.05", "cuda": [13, 2]}
    assert (read["count"], read["visible"]) == (1, [0])
    assert read["none"]["faults"] != ()
    card = read["card"]
    links = card.pop("links")
    assert len(links) == 18
    assert links[17] == {"index": 17, "active": True, "recoveries": 171}
    assert card == {
        "index": 0,
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-1234abcd-0000-1111-2222-333344445555",
        "faults": [],
        "recovery_action": 2,
        "ecc_enabled": True,
        "ecc_uncorrected": 0,
        "rows": {"pending": False, "failed": False},
        "throttle_reasons": 1,
        "power_limit": 700.0,
        "default_power_limit": 650.0,
        "pcie_generation": 4,
        "pcie_max_generation": 5,
        "pcie_width": 16,
        "busy_power_state": True,
        "processes": [{"pid": 4242, "memory": 8_589_934_593}, {"pid": 4243, "memory": None}],
    }


def test_a_sample(read):
    assert read["energies"] == [5e9]
    assert read["sample"] == {
        "gpu_power_w": pytest.approx(69.432),
        "gpu_utilization": 0.83,
        "gpu_memory_bytes": 4_325_376,
        "gpu_temperature_c": 31,
        "gpu_clock_mhz": 341,
        "pcie_bytes_per_s": 2001 * 1024.0,
        "nvlink_bytes": 12_000_000_277 * 1024,
    }


def test_errors_are_told_once(read):
    assert read["events"] == [[0, 79], [0, 94]]
    assert read["later"] == []
