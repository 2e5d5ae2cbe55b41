"""Samples of recorded cards, and what they add up to."""

import logging
import threading
from types import SimpleNamespace

import pynvml
import pytest

from moepp_megatron.features.telemetry.sampler import (
    NOTHING,
    CpuSource,
    GpuSource,
    Sampler,
    Usage,
)
from moepp_megatron.runtime.nvml import Nvml
from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers

TX = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX
RX = pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def busy(index, **changes):
    return answers(
        index,
        nvmlDeviceGetPowerUsage=600_000,
        nvmlDeviceGetUtilizationRates=SimpleNamespace(gpu=90, memory=50),
        nvmlDeviceGetMemoryInfo=SimpleNamespace(total=80 * 10**9, used=(40 + index) * 10**9),
        nvmlDeviceGetTemperature=60 + index,
        nvmlDeviceGetClockInfo=1500,
        **changes,
    )


def gpu_source(library, cards, clock):
    return GpuSource([card["nvmlDeviceGetUUID"] for card in cards], Nvml(library), clock)


def test_a_card_is_sampled_in_the_units_of_the_record():
    clock, cards = Clock(), [busy(0), busy(1)]
    source = gpu_source(FakeNvml(*cards), cards, clock)
    assert source.devices == 2
    first = source.sample()[1]
    # No rate of NVLink, which needs two looks.
    assert first == {
        "gpu_power_w": 600.0,
        "gpu_utilization": 0.9,
        "gpu_clock_mhz": 1500,
        "gpu_memory_bytes": 41 * 10**9,
        "gpu_temperature_c": 61,
        "pcie_bytes_per_s": 2 * 1000 * 1024,
    }
    cards[1]["fields"] |= {TX: 1_500, RX: 2_700}
    clock.now += 2.0
    # 500 + 700 KiB in two seconds.
    assert source.sample()[1]["nvlink_bytes_per_s"] == 1200 * 1024 / 2
    cards[1]["fields"] |= {TX: 0, RX: 0}
    clock.now += 2.0
    assert "nvlink_bytes_per_s" not in source.sample()[1]


def test_only_the_cards_of_the_run_are_sampled():
    cards = [busy(0), busy(1), busy(2)]
    source = gpu_source(FakeNvml(*cards), cards[2:], Clock())
    (sample,) = source.sample()
    assert sample["gpu_temperature_c"] == 62


def test_xid_errors_are_told_once():
    library = FakeNvml(busy(0), busy(1))
    source = gpu_source(library, [busy(0), busy(1)], Clock())
    assert library.watched == [0, 1]
    assert source.faults() == []
    library.xids = [(1, 79), (0, 48)]
    told = source.faults()
    assert [text.split(";")[0] for text in told] == ["GPU 1: Xid 79", "GPU 0: Xid 48"]
    assert source.faults() == []


def test_energy_comes_from_the_counter_and_needs_every_card():
    cards = [busy(0), busy(1)]
    source = gpu_source(FakeNvml(*cards), cards, Clock())
    assert source.energy_j() == pytest.approx(2 * 1_234_567.89)
    cards[1]["nvmlDeviceGetTotalEnergyConsumption"] = pynvml.NVMLError_NotSupported()
    assert source.energy_j() is None


class Script:
    """A source that says what it was told to."""

    devices = 2

    def __init__(self):
        self.energy = 1000.0
        self.power = 100.0
        self.error = None
        self.reported = []
        self.is_closed = False

    def sample(self):
        if self.error is not None:
            raise self.error
        return [{"gpu_power_w": self.power, "gpu_temperature_c": 50.0 + self.power / 100}] * 2

    def energy_j(self):
        return self.energy

    def faults(self):
        told, self.reported = self.reported, []
        return told

    def close(self):
        self.is_closed = True


def test_samples_are_those_since_the_last_take():
    clock, source = Clock(), Script()
    sampler = Sampler(source, interval_s=1.0, clock=clock)
    for power in (100.0, 300.0):
        source.power = power
        sampler.look()
    clock.now += 7.0
    source.energy = 1500.0
    assert sampler.take().metrics(0) == {
        "gpu_power_w": 200.0,
        "gpu_temperature_c": 53.0,
        "gpu_hours": 2 * 7.0 / 3600,
        "energy_j": 500.0,
    }
    # No look since then: the newest one counts, the energy is that of the time.
    clock.now += 1.0
    source.energy = 1510.0
    found = sampler.take().metrics(0)
    assert (found["gpu_power_w"], found["energy_j"]) == (300.0, 10.0)
    assert found["gpu_hours"] == 2 * 1.0 / 3600


def test_a_counter_that_starts_anew_gives_no_energy():
    source = Script()
    sampler = Sampler(source, 1.0, Clock())
    source.energy = 3.0
    assert "energy_j" not in sampler.take().metrics(0)
    source.energy = 5.0
    assert sampler.take().metrics(0)["energy_j"] == 2.0


def test_a_source_that_fails_is_given_up_and_the_run_continues(caplog):
    source = Script()
    sampler = Sampler(source, 1.0, Clock())
    sampler.look()
    source.error = RuntimeError("GPU is lost")
    with caplog.at_level(logging.WARNING):
        sampler.look()
        sampler.look()
    assert caplog.text.count("telemetry is off from here on: GPU is lost") == 1
    assert "energy_j" not in sampler.take().metrics(0)


def test_faults_are_logged_as_errors(caplog):
    source = Script()
    source.reported = ["GPU 1: Xid 79"]
    Sampler(source, 1.0, Clock()).look()
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("ERROR", "GPU 1: Xid 79")]


def test_the_thread_samples_until_it_is_stopped():
    class Counting(Script):
        looks = 0
        enough = threading.Event()

        def sample(self):
            self.looks += 1
            if self.looks == 3:
                self.enough.set()
            return super().sample()

    source = Counting()
    sampler = Sampler(source, interval_s=0.001)
    sampler.start()
    assert source.enough.wait(60)
    sampler.stop()
    seen = source.looks
    assert source.is_closed
    # Sum and number of the first mean, which is the power.
    assert sampler.take().sums[:2] == [100.0 * 2 * seen, 2 * seen]


def test_cpu_source():
    (sample,) = CpuSource().sample()
    assert 0.0 <= sample["cpu_utilization"] <= 1.0
    assert sample["host_memory_bytes"] > 0
    assert CpuSource().energy_j() is None


def reduced(*usages):
    """Return the results of the all-reduces over ranks."""
    sums = [sum(column) for column in zip(*(u.sums for u in usages), strict=True)]
    return Usage(sums, [max(column) for column in zip(*(u.highest for u in usages), strict=True)])


def test_nodes_add_up_and_ranks_without_sampler_change_nothing():
    one = Usage.of([[{"gpu_power_w": 100.0, "gpu_memory_bytes": 5}]] * 3, 10.0, 1, 2.0)
    two = Usage.of([[{"gpu_power_w": 500.0, "gpu_memory_bytes": 4}]], 30.0, 8, 2.5)
    assert reduced(NOTHING, one, NOTHING, two).metrics(tokens=20) == {
        "gpu_power_w": 200.0,
        "gpu_memory_bytes": 5,
        "gpu_hours": pytest.approx(9 * 2.5 / 3600),
        "energy_j": 40.0,
        "energy_per_token_j": 2.0,
    }


def test_energy_is_unknown_if_one_node_does_not_tell():
    known, unknown = Usage.of([], 10.0, 1, 1.0), Usage.of([], None, 1, 1.0)
    assert reduced(known, NOTHING).metrics(0)["energy_j"] == 10.0
    assert "energy_j" not in reduced(known, unknown).metrics(0)


def test_fields_of_a_cpu():
    sample = {"cpu_utilization": 0.5, "host_memory_bytes": 9.0}
    found = Usage.of([[sample]], None, 0, 6.0).metrics(tokens=1)
    assert found == sample
    assert type(found["host_memory_bytes"]) is int
