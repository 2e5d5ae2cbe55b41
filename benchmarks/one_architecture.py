"""A wheel with the GPU code of one architecture, for a machine to which little can be carried.

    python -m benchmarks.one_architecture WHEEL --sm 90 --out DIR

Transformer Engine's library has code for eight architectures: 276 MB, of which a Hopper GPU uses
18. The code of the others becomes zeros, which a wheel stores as nothing. Each piece of code has a
header that names its architecture, which is what CUDA chooses by, and headers stay as they are.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import struct
import sys
import zipfile
from pathlib import Path

# A container of GPU code ("fatbin"): magic, version, bytes of this header, bytes of its pieces.
_CONTAINER = struct.Struct("<IHHQ")
_MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, _CONTAINER.size)
# A piece: what it is, version, bytes of this header, bytes of code; the architecture is at 28.
_PIECE = struct.Struct("<HHIQ")
_ARCHITECTURE = 28


def blank_others(library: bytearray, sm: int) -> int:
    """Zero the code for all architectures but `sm`, in place; returns the bytes of it that stay."""
    stays, position = 0, library.find(_MAGIC)
    while position >= 0:
        *_, header, size = _CONTAINER.unpack_from(library, position)
        position += header
        end = position + size
        while position < end:
            *_, header, size = _PIECE.unpack_from(library, position)
            (architecture,) = struct.unpack_from("<I", library, position + _ARCHITECTURE)
            if architecture == sm:
                stays += size
            else:
                library[position + header : position + header + size] = bytes(size)
            position += header + size
        position = library.find(_MAGIC, end)
    return stays


def write_wheel(source: Path, out: Path, sm: int) -> int:
    """Write the wheel `out`; returns the bytes of code for `sm` that its libraries have."""
    stays, lines = 0, []
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            if item.filename.endswith(".dist-info/RECORD"):
                record = item
                continue
            content = old.read(item)
            if item.filename.endswith(".so"):
                library = bytearray(content)
                stays += blank_others(library, sm)
                content = bytes(library)
            new.writestr(item, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            lines.append(f"{item.filename},sha256={digest.decode()},{len(content)}\n")
        new.writestr(record, "".join([*lines, f"{record.filename},,\n"]))
    return stays


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A wheel with GPU code of one architecture.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sm", type=int, required=True, help="90 for Hopper, 100 for Blackwell")
    parser.add_argument("--out", type=Path, required=True, help="another folder, for the new wheel")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / arguments.wheel.name
    if path.exists():
        sys.exit(f"error: {path} must not exist; name another folder")
    stays = write_wheel(arguments.wheel, path, arguments.sm)
    if stays == 0:
        path.unlink()
        sys.exit(f"error: {arguments.wheel} must have code for --sm {arguments.sm}; it has none")
    print(f"wheel        {path} ({path.stat().st_size / 2**20:.0f} MiB)")


if __name__ == "__main__":
    main()
