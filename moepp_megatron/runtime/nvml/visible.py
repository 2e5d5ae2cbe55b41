"""Which of NVML's GPUs CUDA shows to a process: the two number them differently."""

from __future__ import annotations

from collections.abc import Sequence

# "MIG-GPU-<uuid>/<instance>/<slice>" is the name of a MIG device up to driver 470.
_PREFIXES = ("MIG-GPU-", "MIG-", "GPU-")


def bare_uuid(name: str) -> str:
    """The UUID alone of "GPU-...", "MIG-..." or the older "MIG-GPU-.../1/0"."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix).partition("/")[0]
    return name


def visible_indices(variable: str | None, uuids: Sequence[Sequence[str]]) -> list[int]:
    """NVML's numbers of the GPUs that CUDA shows, in CUDA's order.

    The first entry that names no GPU ends the list, as for CUDA (CUDA C++ Programming Guide,
    "CUDA Environment Variables"). Numbers are CUDA's own, which are NVML's where all GPUs of the
    node are of one kind or CUDA_DEVICE_ORDER is PCI_BUS_ID.

    Args:
        variable: CUDA_VISIBLE_DEVICES, which holds numbers or (beginnings of) UUIDs; None where it
            is not set.
        uuids: [GPUs] UUIDs of each GPU and of the MIG devices on it.
    """
    if variable is None:
        return list(range(len(uuids)))
    indices: list[int] = []
    for entry in variable.split(","):
        index = _index(entry.strip(), uuids)
        if index is None:
            break
        indices.append(index)
    return indices


def _index(entry: str, uuids: Sequence[Sequence[str]]) -> int | None:
    if entry.isdecimal():
        return int(entry) if int(entry) < len(uuids) else None
    wanted = bare_uuid(entry)
    if wanted == entry or not wanted:
        return None
    named = [
        index
        for index, names in enumerate(uuids)
        if any(bare_uuid(name).startswith(wanted) for name in names)
    ]
    return named[0] if len(named) == 1 else None
