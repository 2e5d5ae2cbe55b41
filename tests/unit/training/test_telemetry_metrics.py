"""From devices to the fields of a record."""

import pytest

from moepp_megatron.features.telemetry.part import first_of_each_node, usage_metrics
from moepp_megatron.features.telemetry.usage import DeviceSample, Usage


def test_fields_of_cards():
    sample = DeviceSample(power_w=600.0, utilization=0.9, memory_bytes=5.0, temperature_c=60.0)
    usage = Usage.of([[sample, sample]], energy_j=7200.0, devices=2, seconds=6.0)
    assert usage_metrics(usage, tokens=3600) == {
        "gpu_power_w": 600.0,
        "gpu_utilization": 0.9,
        "gpu_memory_bytes": 5,
        "gpu_temperature_c": 60.0,
        "gpu_hours": pytest.approx(2 * 6.0 / 3600),
        "energy_j": 7200.0,
        "energy_per_token_j": 2.0,
    }


def test_no_energy_a_token_without_tokens():
    usage = Usage.of([], energy_j=7200.0, devices=2, seconds=6.0)
    assert set(usage_metrics(usage, tokens=0)) == {"gpu_hours", "energy_j"}


def test_fields_of_a_cpu():
    usage = Usage.of([[DeviceSample(utilization=0.5, memory_bytes=9.0)]], None, 0, 6.0)
    assert usage_metrics(usage, tokens=1) == {"cpu_utilization": 0.5, "host_memory_bytes": 9}


def test_the_first_rank_of_every_node():
    assert first_of_each_node(["a", "a", "b", "b"]) == {"a": 0, "b": 2}
    assert first_of_each_node(["b", "a", "b", "a"]) == {"b": 0, "a": 1}
