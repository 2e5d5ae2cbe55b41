"""NVML's readings of a real card, as doctor and telemetry take them."""

import json
import sys
import time
from contextlib import closing

import pytest
import torch

from moepp_megatron.features.telemetry.sampler import GpuSource
from moepp_megatron.runtime.nvml import Nvml
from tests.commands import captured
from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers

pytestmark = pytest.mark.gpu


@pytest.fixture
def library(card):
    """NVML itself, or recorded answers where a CPU stands for the card."""
    return None if card.type == "cuda" else FakeNvml(answers())


@pytest.fixture
def nvml(library):
    with Nvml(library) as opened:
        yield opened


@pytest.fixture
def uuid(card):
    if card.type == "cpu":
        return answers()["nvmlDeviceGetUUID"]
    return f"GPU-{torch.cuda.get_device_properties(card).uuid}"


def test_driver_and_card(nvml, card, uuid):
    driver = nvml.driver()
    assert driver.version
    assert driver.cuda is not None
    (index,) = nvml.index_of([uuid])
    found = nvml.card(index)
    assert found.faults == ()
    assert found.uuid == uuid
    if card.type == "cuda":
        assert found.name == torch.cuda.get_device_name(card)
    assert found.power_limit > 10


def test_a_sample_is_in_the_units_it_says(nvml, uuid):
    (index,) = nvml.index_of([uuid])
    sample = nvml.sample(index)
    # Whatever a card does: W, degrees Celsius, MHz, a share, bytes.
    assert 10 < sample["gpu_power_w"] < 2000
    assert 10 < sample["gpu_temperature_c"] < 110
    assert 100 < sample["gpu_clock_mhz"] < 4000
    assert 0.0 <= sample["gpu_utilization"] <= 1.0
    assert sample["gpu_memory_bytes"] > 2**20


def test_energy_grows_while_the_card_works(cuda, nvml, uuid):
    indices = nvml.index_of([uuid])
    (before,) = nvml.energies(indices)
    began = time.monotonic()
    matrix = torch.randn(4096, 4096, device="cuda")
    while time.monotonic() - began < 1.0:
        matrix = torch.mm(matrix, matrix).clamp_(-1, 1)
        torch.cuda.synchronize()
    (after,) = nvml.energies(indices)
    # At least a second at the 10 W of an idle card.
    assert after - before > 10


def test_telemetry_reads_the_card(library, uuid):
    with closing(GpuSource([uuid], Nvml(library))) as source:
        assert source.devices == 1
        (sample,) = source.sample()
        assert sample["gpu_power_w"] > 10
        assert sample["gpu_memory_bytes"] > 2**20
        assert source.faults() == []


def test_doctor_finds_the_card(cuda):
    command = [sys.executable, "-m", "moepp_megatron.cli.main", "doctor", "--json"]
    done = captured(command, timeout=280)
    # 3: a card that is not fit, which is the doctor's to say.
    assert done.returncode in (0, 3), done.stderr[-4000:]
    assert torch.cuda.get_device_name(0) in done.stdout
    json.loads(done.stdout)
