"""The examination as a whole, on recorded cards."""

from dataclasses import replace

import pynvml
import pytest

from moepp_megatron.config import hardware
from moepp_megatron.tools.doctor import folders, gpu_checks, packages, system
from moepp_megatron.tools.doctor.examine import Request, _NodeExaminer, expected_gpus
from moepp_megatron.tools.doctor.finding import Severity, worst
from moepp_megatron.tools.doctor.gpu_checks import Cards, _TorchCuda
from moepp_megatron.tools.doctor.speed import DeviceSpeed
from tests.unit.tools.doctor.fake_nvml import FakeNvml, answers
from tests.unit.tools.doctor.test_cards import BUSY


@pytest.fixture(autouse=True)
def _sound_node(monkeypatch):
    monkeypatch.setattr(gpu_checks, "_torch_cuda", lambda: _TorchCuda((13, 0), True))
    engine, *others = packages.optional_backends()
    backends = [replace(engine, version="2.20", used=True), *others]
    monkeypatch.setattr(packages, "optional_backends", lambda: backends)
    monkeypatch.setattr(system, "_shared_memory_bytes", lambda: 64 * 2**30)
    monkeypatch.setattr(system, "_read_ports", lambda: [])
    monkeypatch.setattr(system._Limits, "read", lambda: system._Limits(None, None, None))
    monkeypatch.setattr(folders, "_write_rate", lambda folder, num_bytes: 1e9)


def examiner(*cards, **request):
    return _NodeExaminer(Request(**request), Cards.read(FakeNvml(*cards)))


def test_a_sound_node_is_fit():
    eight = examiner(*(answers(i) for i in range(8)), preflight=True, expected_gpus=8)
    assert eight.hardware.name == "h100_sxm"
    speeds = [DeviceSpeed(f"GPU {i}", 720.0) for i in range(8)]
    findings = eight.node_findings() + eight.speed_findings(speeds)
    assert worst(findings) < Severity.WARNING, [f.line() for f in findings]


def test_a_sick_card_makes_the_node_unfit():
    sick = examiner(answers(0), answers(1, uncorrected=1), preflight=True)
    errors = [f for f in sick.node_findings() if f.severity == Severity.ERROR]
    assert [f.check for f in errors] == ["ECC errors"]


def test_a_card_is_looked_at_under_load():
    slow = answers(0, **(BUSY | {"nvmlDeviceGetCurrPcieLinkGeneration": 1}))
    node = examiner(answers(0))
    loaded = Cards.read(FakeNvml(slow)).cards
    found = node.speed_findings([DeviceSpeed("GPU 0", 720.0)], loaded)
    assert [f.check for f in found if f.severity > Severity.OK] == ["PCIe"]


def test_a_broken_driver_is_an_error_and_no_driver_is_not():
    broken = _NodeExaminer(
        Request(), Cards.read(FakeNvml(init_error=pynvml.NVMLError_DriverNotLoaded()))
    )
    assert worst(broken.node_findings()) == Severity.ERROR
    cards = Cards.read(FakeNvml(init_error=pynvml.NVMLError_LibraryNotFound()))
    cpu = _NodeExaminer(Request(), cards)
    assert cpu.hardware.kind == "cpu"
    gpu, *_ = cpu.node_findings()
    assert (gpu.check, gpu.severity) == ("GPU count", Severity.NOTE)
    wanted, *_ = _NodeExaminer(Request(expected_gpus=8), cards).node_findings()
    assert (wanted.check, wanted.severity) == ("GPU count", Severity.ERROR)


def test_without_descriptions_nothing_is_judged_by_rated_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "HARDWARE_FOLDER", tmp_path)
    for cards in (FakeNvml(answers(0)), FakeNvml(init_error=pynvml.NVMLError_LibraryNotFound())):
        node = _NodeExaminer(Request(), Cards.read(cards))
        assert node.hardware is None
        assert worst(node.node_findings()) < Severity.WARNING


def test_cards_that_slurm_gave():
    assert expected_gpus({}) is None
    assert expected_gpus({"SLURM_GPUS_ON_NODE": "8"}) == 8
