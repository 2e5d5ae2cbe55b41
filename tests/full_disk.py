"""Disks of any size, and files that leave as much of them as a test wants."""

from __future__ import annotations

import contextlib
from pathlib import Path

_BLOCK = 1 << 16


def fill(folder: Path, leave: int = 0) -> Path:
    """Write `ballast` until the disk is full, then give `leave` bytes back."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(_BLOCK)):
                pass
        file.truncate(file.tell() - leave)
    return ballast


def torch_error() -> Exception:
    """The very exception that `torch.save` raises on a full disk: not an OSError."""
    import torch

    stream = Path("/dev/full").open("wb")
    try:
        torch.save(torch.zeros(100_000), stream)
    except RuntimeError as error:
        return error
    finally:
        with contextlib.suppress(OSError):
            stream.close()
    raise AssertionError("torch.save raised no RuntimeError: runtime/disk.py may be simpler now")
