"""Disks of any size, and files that leave as much of them as a test wants."""

import contextlib
from pathlib import Path

_BLOCK = 1 << 16


def fill(folder, leave=0):
    """Write `ballast` until the disk is full, then give `leave` bytes back."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(_BLOCK)):
                pass
        file.truncate(file.tell() - leave)
    return ballast


def torch_error():
    """The very exception that `torch.save` raises on a full disk: not an OSError."""
    import torch

    found = None
    # What is still in the file's buffer is refused once more when it is closed.
    with contextlib.suppress(OSError), Path("/dev/full").open("wb") as stream:
        try:
            torch.save(torch.zeros(100_000), stream)
        except RuntimeError as error:
            found = error
    assert found is not None, "torch.save raised an OSError: runtime/disk.py may be simpler now"
    return found
