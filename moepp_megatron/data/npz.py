"""Reads arrays of a file of `numpy.savez`, which somebody else may have made."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepp_megatron.config.regular_file import check_regular
from moepp_megatron.data.source_files import unpacked_limit


def read_arrays(path: Path, name: str, *more: str) -> dict[str, NDArray[Any]]:
    """Return the array `name` of a file of `numpy.savez`, and of `more` those that it has.

    Raises OSError if the file cannot be read or is no regular file. Raises ValueError if it is of
    another kind, is damaged, lacks the array, has one of objects, which could run code, or unpacks
    to more than `unpacked_limit`.
    """
    check_regular(path)
    with path.open("rb") as stream:
        if stream.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX:
            raise ValueError(f"it is one array, of numpy.save, not named {name}")
        try:
            with zipfile.ZipFile(stream) as archive:
                there = [one for one in (name, *more) if f"{one}.npy" in archive.namelist()]
                if name not in there:
                    raise ValueError(f"it has no array {name}")
                return {one: _read(archive, one, unpacked_limit(path)) for one in there}
        except Exception as error:
            # zipfile, its compressions and the parser of a header have a dozen kinds of errors.
            if isinstance(error, ValueError) or getattr(error, "errno", None) is not None:
                raise
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"{type(error).__name__}: {said}") from error


def _read(archive: zipfile.ZipFile, name: str, limit: int) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    if entry.file_size > limit:
        raise ValueError(f"it unpacks to more than {limit} bytes")
    array: NDArray[Any] = np.lib.format.read_array(
        io.BytesIO(archive.read(entry)), allow_pickle=False
    )
    return array
