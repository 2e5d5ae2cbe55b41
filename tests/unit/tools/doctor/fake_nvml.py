"""A stand-in for the module `pynvml`: constants and errors of the real one, recorded answers.

The answers have the form, the units and the magnitudes that NVML documents for an H100 SXM; a sick
card is a healthy one with some answers replaced.
"""

from types import SimpleNamespace

import pynvml

LINKS = 18
# Fields that each link has by itself, and what NVML takes for their sum in place of a link.
_OF_LINKS = (
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
    pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
)
_ALL_LINKS = 0xFFFFFFFF


def answers(index=0, **changes):
    """Return NVML's answers about a healthy, idle card; a value may be an error to raise."""
    healthy = {
        "nvmlDeviceGetName": "NVIDIA H100 80GB HBM3",
        "nvmlDeviceGetUUID": f"GPU-0000000{index}-aaaa-bbbb-cccc-dddddddddddd",
        "nvmlDeviceGetEccMode": [1, 1],
        "uncorrected": 0,
        "nvmlDeviceGetRemappedRows": (0, 0, 0, 0),
        "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonGpuIdle,
        "nvmlDeviceGetClockInfo": 345,
        "nvmlDeviceGetPowerUsage": 69_432,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetPowerManagementDefaultLimit": 700_000,
        "nvmlDeviceGetTotalEnergyConsumption": 1_234_567_890,
        "nvmlDeviceGetTemperature": 31,
        "nvmlDeviceGetPerformanceState": pynvml.NVML_PSTATE_0,
        "nvmlDeviceGetCurrPcieLinkGeneration": 5,
        "nvmlDeviceGetMaxPcieLinkGeneration": 5,
        "nvmlDeviceGetCurrPcieLinkWidth": 16,
        "nvmlDeviceGetPcieThroughput": 1000,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=85_520_809_984, used=4_325_376),
        "nvmlDeviceGetComputeRunningProcesses": [],
        "nvmlDeviceGetMaxMigDeviceCount": 7,
        "mig": [],
        "links": [1] * LINKS,
        "link_errors": {},
        "fields": {
            pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: 0,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 1_000,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 2_000,
        },
    }
    unknown = set(changes) - set(healthy) - {"nvmlDeviceGetHandleByIndex"}
    assert not unknown, f"NVML is never asked for {unknown}"
    return healthy | changes


def process(pid, memory):
    """A running process as nvidia-ml-py describes it."""
    return SimpleNamespace(pid=pid, usedGpuMemory=memory)


class FakeNvml:
    """Answers like `pynvml` for the given cards, whose handles are their numbers."""

    def __init__(self, *cards, driver="580.95.05", cuda=13000, init_error=None):
        self._cards, self._driver, self._cuda = cards, driver, cuda
        self._init_error = init_error
        self.watched = []
        self.xids = []
        self.is_open = False

    def __getattr__(self, name):
        if not name.startswith("nvml") or isinstance(getattr(pynvml, name, None), int):
            return getattr(pynvml, name)
        if name.startswith(("nvmlDevice", "nvmlSystem")):
            return lambda handle, *arguments: _answer(self._cards[handle], name)
        raise AttributeError(name)

    def nvmlInit(self):
        if self._init_error is not None:
            raise self._init_error
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount(self):
        return len(self._cards)

    def nvmlSystemGetDriverVersion(self):
        return self._driver

    def nvmlSystemGetCudaDriverVersion_v2(self):
        return self._cuda

    def nvmlDeviceGetHandleByIndex(self, index):
        _answer(
            self._cards[index] | {"nvmlDeviceGetHandleByIndex": None} | self._cards[index],
            "nvmlDeviceGetHandleByIndex",
        )
        return index

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, part):
        if part >= len(self._cards[handle]["mig"]):
            raise pynvml.NVMLError_NotFound
        return handle, part

    def nvmlDeviceGetUUID(self, handle):
        if isinstance(handle, tuple):
            return self._cards[handle[0]]["mig"][handle[1]]
        return _answer(self._cards[handle], "nvmlDeviceGetUUID")

    def nvmlEventSetCreate(self):
        return "events"

    def nvmlDeviceRegisterEvents(self, handle, kinds, events):
        assert kinds == pynvml.nvmlEventTypeXidCriticalError
        self.watched.append(handle)

    def nvmlEventSetWait_v2(self, events, timeout_ms):
        assert timeout_ms == 0, "telemetry must not wait"
        if not self.xids:
            raise pynvml.NVMLError_Timeout
        handle, xid = self.xids.pop(0)
        return SimpleNamespace(device=handle, eventData=xid)

    def nvmlDeviceGetIndex(self, handle):
        return handle

    def nvmlDeviceGetTotalEccErrors(self, handle, kind, counter):
        corrected = kind == pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
        return _answer(self._cards[handle], "corrected" if corrected else "uncorrected")

    def nvmlDeviceGetNvLinkState(self, handle, link):
        links = self._cards[handle]["links"]
        if link >= len(links):
            raise pynvml.NVMLError_NotSupported
        return links[link]

    def nvmlDeviceGetNvLinkErrorCounter(self, handle, link, counter):
        return self._cards[handle]["link_errors"].get((link, counter), 0)

    def nvmlDeviceGetFieldValues(self, handle, fields):
        return [self._field_value(self._cards[handle], field) for field in fields]

    @staticmethod
    def _field_value(card, field):
        # nvidia-ml-py leaves the scope of a bare number 0, which is the first link.
        number, link = field if isinstance(field, tuple) else (field, 0)
        value = card["fields"].get(number)
        if number in _OF_LINKS and value is not None and link != _ALL_LINKS:
            value //= len(card["links"])
        return SimpleNamespace(
            nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED if value is None else 0,
            valueType=pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG,
            value=SimpleNamespace(ullVal=value),
        )


def _answer(card, name):
    value = card[name]
    if isinstance(value, Exception):
        raise value
    return value
