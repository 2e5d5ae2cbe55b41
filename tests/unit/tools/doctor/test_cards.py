"""Healthy cards yield no complaint; each sickness yields exactly its own."""

import pynvml
import pytest

from moepp_megatron.config.hardware import Hardware, load_hardware
from moepp_megatron.runtime.gpu_state import Driver
from moepp_megatron.tools.doctor import card_checks, gpu_checks
from moepp_megatron.tools.doctor.finding import Judge, Severity
from moepp_megatron.tools.doctor.gpu_checks import Cards, _TorchCuda
from tests.unit.tools.doctor.fake_nvml import LINKS, FakeNvml, answers, process

H100 = load_hardware("h100_sxm")
OWN_PID, OTHER_PID = 41, 42
GIB = 2**30


def judge(preflight=False):
    return Judge(H100, preflight, frozenset({OWN_PID}))


def complaints(*cards, preflight=False):
    read = Cards.read(FakeNvml(*cards)).cards
    found = card_checks.check_cards(read, judge(preflight))
    return [finding for finding in found if finding.severity > Severity.OK]


BUSY = {
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
}


@pytest.mark.parametrize("state", [{}, BUSY], ids=["idle", "busy"])
def test_healthy_cards_have_one_ok_finding_a_check(state):
    cards = [answers(index, **state) for index in range(8)]
    findings = card_checks.check_cards(Cards.read(FakeNvml(*cards)).cards, judge(preflight=True))
    assert {finding.severity for finding in findings} == {Severity.OK}
    assert len({finding.check for finding in findings}) == len(findings) == 10
    assert "18 links up" in next(f.found for f in findings if f.check == "NVLink")


ERROR, WARNING, NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE
REASONS = "nvmlDeviceGetCurrentClocksEventReasons"
RECOVERY = pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
SICKNESSES = {
    "lost while asked": (
        {"nvmlDeviceGetEccMode": pynvml.NVMLError_GpuIsLost()},
        ("GPU faults", ERROR, "GPU is lost", "Xid"),
    ),
    "no handle": (
        {"nvmlDeviceGetHandleByIndex": pynvml.NVMLError_Unknown()},
        ("GPU faults", ERROR, "Unknown Error", "Xid"),
    ),
    "reset asked for": (
        {"fields": {RECOVERY: pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET}},
        ("GPU recovery", ERROR, "a GPU reset", "before the next job"),
    ),
    "uncorrectable ECC": (
        {"uncorrected": 3},
        ("ECC errors", ERROR, "3 uncorrectable", "reset the GPU"),
    ),
    "ECC off": (
        {"nvmlDeviceGetEccMode": [0, 0]},
        ("ECC errors", WARNING, "ECC is off", "nvidia-smi -e 1"),
    ),
    "row remapping failed": (
        {"nvmlDeviceGetRemappedRows": (0, 2, 0, 1)},
        ("GPU memory rows", ERROR, "could not be remapped", "return the GPU"),
    ),
    "row remapping pending": (
        {"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)},
        ("GPU memory rows", ERROR, "remapped row waits for a reset", "nvidia-smi -r"),
    ),
    "hot hardware": (
        {REASONS: pynvml.nvmlClocksEventReasonHwThermalSlowdown},
        ("GPU throttling", ERROR, "hardware thermal slowdown", "cooling"),
    ),
    "power brake": (
        {REASONS: pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown},
        ("GPU throttling", ERROR, "power brake", "power supplies"),
    ),
    "hot software": (
        {REASONS: pynvml.nvmlClocksEventReasonSwThermalSlowdown},
        ("GPU throttling", WARNING, "software thermal slowdown", "cooling"),
    ),
    "clocks set by hand": (
        {REASONS: pynvml.nvmlClocksEventReasonApplicationsClocksSetting | 1},
        ("GPU throttling", WARNING, "clocks set by hand", "-rgc"),
    ),
    "power cap": (
        {"nvmlDeviceGetEnforcedPowerLimit": 450_000},
        ("GPU power cap", WARNING, "capped at 450 W", "-pl 700"),
    ),
    "taken": (
        {"nvmlDeviceGetComputeRunningProcesses": [process(OTHER_PID, 2 * GIB)]},
        ("GPU processes", WARNING, "42 hold 2.0 GiB", "end them"),
    ),
    "taken, memory hidden": (
        {"nvmlDeviceGetComputeRunningProcesses": [process(OTHER_PID, None)]},
        ("GPU processes", WARNING, "an unknown amount", "end them"),
    ),
    "narrow PCIe": ({"nvmlDeviceGetCurrPcieLinkWidth": 8}, ("PCIe", WARNING, "x8", "reseat")),
    "old PCIe slot": (
        {"nvmlDeviceGetMaxPcieLinkGeneration": 4, "nvmlDeviceGetCurrPcieLinkGeneration": 4},
        ("PCIe", WARNING, "generation 4 at most", "reseat"),
    ),
    "slow PCIe under load": (
        BUSY | {"nvmlDeviceGetCurrPcieLinkGeneration": 1},
        ("PCIe", WARNING, "generation 1 under load", "reseat"),
    ),
    "NVLink down": (
        {"links": [1] * 5 + [0] + [1] * (LINKS - 6)},
        ("NVLink", ERROR, "links 5 are down", "fabricmanager"),
    ),
    "NVLink missing": ({"links": [1] * 12}, ("NVLink", ERROR, "12 links", "fabricmanager")),
    "NVLink recoveries": (
        {"link_errors": {(3, pynvml.NVML_NVLINK_ERROR_DL_RECOVERY): 4}},
        ("NVLink errors", WARNING, "links 3 (4)", "reset the GPU"),
    ),
}


@pytest.mark.parametrize("name", SICKNESSES)
def test_a_sick_card_yields_exactly_its_finding(name):
    changes, (check, severity, found, remedy) = SICKNESSES[name]
    (complaint,) = complaints(answers(0), answers(1, **changes), answers(2))
    assert complaint.check == check
    assert complaint.severity == severity
    assert complaint.found.startswith("GPU 1: ")
    assert found in complaint.found
    assert remedy in complaint.remedy


@pytest.mark.parametrize("name", ["taken", "narrow PCIe"])
def test_what_spoils_a_run_keeps_a_job_from_starting(name):
    changes, _ = SICKNESSES[name]
    (complaint,) = complaints(answers(0, **changes), preflight=True)
    assert complaint.severity == Severity.ERROR


@pytest.mark.parametrize(
    "changes",
    [
        {"nvmlDeviceGetComputeRunningProcesses": [process(OWN_PID, 8 * GIB)]},
        {"nvmlDeviceGetComputeRunningProcesses": [process(OTHER_PID, GIB // 2)]},
        # An idle card lowers its link to save power.
        {"nvmlDeviceGetCurrPcieLinkGeneration": 1},
        {"nvmlDeviceGetPerformanceState": 8, REASONS: 0, "nvmlDeviceGetCurrPcieLinkGeneration": 1},
        {"nvmlDeviceGetRemappedRows": (3, 0, 0, 0)},
        {"nvmlDeviceGetRemappedRows": pynvml.NVMLError_NotSupported()},
        {"nvmlDeviceGetEnforcedPowerLimit": pynvml.NVMLError_NoPermission()},
        {"fields": {}},
        {"links": []},
    ],
)
def test_what_is_no_sickness(changes):
    assert complaints(answers(0, **changes), preflight=True) == []


def test_without_a_description_the_card_is_measured_by_itself():
    read = Cards.read(FakeNvml(answers(0, nvmlDeviceGetEnforcedPowerLimit=450_000))).cards
    undescribed = Judge(Hardware(name="not described"))
    found = card_checks.check_cards(read, undescribed)
    assert [f.check for f in found if f.severity > Severity.OK] == ["GPU power cap"]


def test_count():
    cards = Cards.read(FakeNvml(answers(0), answers(1))).cards
    assert gpu_checks._check_count(cards, None).severity == Severity.OK
    assert gpu_checks._check_count(cards, 2).severity == Severity.OK
    few = gpu_checks._check_count(cards, 8)
    assert (few.severity, few.found, few.rule) == (Severity.ERROR, "2 GPUs", "must be 8")


def test_model():
    same = Cards.read(FakeNvml(answers(0), answers(1))).cards
    assert gpu_checks._check_model(same, H100, True).severity == Severity.OK
    assert gpu_checks._check_model(same, None, True).severity == Severity.NOTE
    named = gpu_checks._check_model(same, load_hardware("a100_sxm"), described=False)
    assert (named.severity, named.rule) == (Severity.WARNING, "should be a a100_sxm")
    mixed = Cards.read(FakeNvml(answers(0), answers(1, nvmlDeviceGetName="NVIDIA H200"))).cards
    found = gpu_checks._check_model(mixed, H100, True)
    assert found.severity == Severity.WARNING
    assert "NVIDIA H200" in found.found


@pytest.mark.parametrize(
    ("cuda", "torch_cuda", "severity", "found"),
    [
        ((13, 0), _TorchCuda((13, 2), True), Severity.OK, "driver 580.95.05 for CUDA 13.0"),
        ((13, 0), _TorchCuda((12, 8), True), Severity.OK, "torch for CUDA 12.8"),
        ((12, 8), _TorchCuda((13, 0), False), Severity.ERROR, "torch for CUDA 13.0"),
        ((13, 0), _TorchCuda(None, False), Severity.ERROR, "torch without CUDA"),
        ((13, 0), _TorchCuda((13, 0), False), Severity.ERROR, "torch finds no GPU"),
    ],
)
def test_driver(cuda, torch_cuda, severity, found):
    finding = gpu_checks._check_driver(Driver("580.95.05", cuda), torch_cuda)
    assert finding.severity == severity
    assert found in finding.found


def test_reading_the_driver_closes_nvml():
    library = FakeNvml(answers(0), cuda=12080)
    read = Cards.read(library)
    assert read.driver == Driver("580.95.05", (12, 8))
    assert not library.is_open


@pytest.mark.parametrize(
    ("error", "has_driver"),
    [
        (pynvml.NVMLError_LibraryNotFound(), False),
        (pynvml.NVMLError_DriverNotLoaded(), True),
        (pynvml.NVMLError_LibRmVersionMismatch(), True),
    ],
)
def test_nvml_that_does_not_start(error, has_driver):
    read = Cards.read(FakeNvml(init_error=error))
    assert read.cards == []
    assert read.error.has_driver == has_driver
