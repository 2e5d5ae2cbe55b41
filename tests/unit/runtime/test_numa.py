"""The cores that a rank keeps to."""

import os
from types import SimpleNamespace

import pytest
import torch

from moepp_megatron.runtime import distributed

ADDRESS = "0001:1b:00.0"
GPU = SimpleNamespace(pci_domain_id=1, pci_bus_id=0x1B, pci_device_id=0)


@pytest.fixture
def system(tmp_path):
    """A machine with two nodes, of which the GPU hangs at the second."""
    _write(tmp_path / "bus/pci/devices" / ADDRESS / "numa_node", "1\n")
    for node, cores in enumerate(("0-3,8-11", "4-7,12,14-15")):
        _write(tmp_path / f"devices/system/node/node{node}/cpulist", f"{cores}\n")
    return tmp_path


def _write(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_cores_of_the_gpus_node_are_near(system):
    assert distributed._cores_near(ADDRESS, system) == {4, 5, 6, 7, 12, 14, 15}


@pytest.mark.parametrize("content", ["-1\n", "7\n", "", None])
def test_where_nothing_is_known_no_core_is_near(system, content):
    path = system / "bus/pci/devices" / ADDRESS / "numa_node"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    assert distributed._cores_near(ADDRESS, system) == set()


@pytest.mark.parametrize(
    ("device", "allowed", "bound"),
    [
        ("cuda", set(range(16)), {4, 5, 6, 7, 12, 14, 15}),
        ("cuda", {3, 4, 5}, {4, 5}),
        # The user has bound it elsewhere.
        ("cuda", {0, 1}, None),
        ("cpu", set(range(16)), None),
    ],
)
def test_a_rank_keeps_to_cores_near_its_gpu_that_it_may_use(
    system, monkeypatch, device, allowed, bound
):
    calls = []
    monkeypatch.setattr(distributed._cores_near, "__defaults__", (system,))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: GPU)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: calls.append(cores))
    distributed.bind_to_gpu(torch.device(device))
    assert calls == ([] if bound is None else [bound])
