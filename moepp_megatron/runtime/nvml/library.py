"""Calls NVML; distinguishes missing answers from faults, and converts units."""

from __future__ import annotations

from typing import Any

# In place of a link's number in a field of NVLink: the sum over all links (nvml.h, `scopeId`).
ALL_LINKS = 2**32 - 1


class Library:
    """The functions of NVML (`pynvml`, initialized, or a stand-in) without its exceptions."""

    def __init__(self, module: Any) -> None:
        self.module = module
        # Nothing to say for this GPU, this driver or this user: not a fault.
        self._silent = (
            module.NVMLError_NotSupported,
            module.NVMLError_FunctionNotFound,
            module.NVMLError_NoPermission,
            module.NVMLError_InvalidArgument,
            module.NVMLError_NotFound,
            module.NVMLError_NoData,
        )

    def ask(self, function: str, *arguments: Any, faults: list[str] | None = None) -> Any:
        """Call a function; None where NVML has no answer. Errors of the GPU go to `faults`."""
        try:
            return getattr(self.module, function)(*arguments)
        except (AttributeError, *self._silent):
            return None
        except self.module.NVMLError as error:
            if faults is not None and str(error) not in faults:
                faults.append(str(error))
            return None

    def fields(self, handle: Any, *fields: int | tuple[int, int]) -> list[int | None]:
        """Field values of a GPU, each None where it has none; of an NVLink field (field, link)."""
        values = self.ask("nvmlDeviceGetFieldValues", handle, list(fields))
        if values is None:
            return [None] * len(fields)
        return [
            int(_field_number(value, self.module)) if value.nvmlReturn == 0 else None
            for value in values
        ]


def text(value: Any) -> str | None:
    """Older versions of nvidia-ml-py hand out bytes."""
    return value.decode() if isinstance(value, bytes) else value


def scaled(value: int | None, factor: float) -> float | None:
    """An integer of NVML in another unit."""
    return None if value is None else value * factor


def _field_number(value: Any, library: Any) -> float:
    """The member of a field value's union that its type names."""
    members = {
        library.NVML_VALUE_TYPE_DOUBLE: "dVal",
        library.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        library.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        library.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        library.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        library.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
    }
    return float(getattr(value.value, members[value.valueType]))
